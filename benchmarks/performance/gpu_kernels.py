"""The card tier's sections on single operations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from figures import Figure
from gpu_card import Card, section
from torch import Tensor, nn

from flexperts.modeling.quantization import quantizable
from flexperts.moe.dispatch import BY_PAIRS
from flexperts.moe.experts import find_experts
from flexperts.moe.quantized import QuantizedTensor
from flexperts.serving.contract import Sampling
from flexperts.serving.engine.decoding import Decoding
from flexperts.testing import byte_tokenizer


@section(
    "Attention with padding",
    "torch's attention with a mask, bf16, forward and backward: with left padding, where rows see no column, and "
    "with one large head dimension.",
    30,
    "With torch 2.13, cuDNN's backward pass gives NaN where the length is 64 modulo 128 (pytorch issue 196678).",
)
def attention(card: Card) -> Iterator[Figure]:
    """Values that are not finite in outputs and gradients."""
    for length in (64, 96, 192, 256, 320):
        for case in ("left padding", "a large dimension"):
            yield Figure(
                f"{length} columns, {case}: values that are not finite", _broken(card, length, case), "", 0
            )


def _broken(card: Card, length: int, case: str) -> int:
    seeded = torch.Generator().manual_seed(0)
    drawn = [0.1 * torch.randn(2, 4, length, 64, generator=seeded).bfloat16() for _ in range(3)]
    if case == "a large dimension":
        drawn[0][..., 0], drawn[1][..., 0] = 1.0, -960.0
    q, k, v = (t.to(card.device).requires_grad_() for t in drawn)
    mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=card.device).tril()
    hidden = length // 3 if case == "left padding" else 0
    mask[1, :, :, :hidden] = False
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    gradient = torch.ones_like(output)
    gradient[1, :, :hidden] = 0
    output.backward(gradient)
    seen = (output[0], output[1, :, hidden:], q.grad, k.grad, v.grad)
    return sum(int((~t.isfinite()).sum()) for t in seen if t is not None)


@section(
    "Routed experts",
    "One layer of Qwen1.5-MoE-A2.7B's shape: 60 experts of 1408, top-4, hidden 2048, random weights in bf16.",
    60,
    "Ours is batched where pairs of token and expert are at most half as many as experts, else grouped.",
)
def experts(card: Card) -> Iterator[Figure]:
    """Each way of transformers against its eager loop: error and time."""
    base = card.qwen(1)
    layer, width = find_experts(base.model)[0].module, base.model.config.hidden_size
    number = find_experts(base.model)[0].num_experts
    seeded = torch.Generator().manual_seed(0)
    for tokens in (1, 8, 128, 4096):
        hidden = torch.randn(tokens, width, generator=seeded).bfloat16().to(card.device).requires_grad_()
        index = torch.rand(tokens, number, generator=seeded).topk(4).indices.to(card.device)
        weights = torch.full(index.shape, 0.25, device=card.device, dtype=torch.bfloat16)
        seconds, outputs = {}, {}
        for way in ("eager", "grouped_mm", "batched_mm", BY_PAIRS):
            if way == "batched_mm" and tokens > 128:
                continue  # a copy of the weights for each of 16,384 pairs
            base.model.set_experts_implementation(way)
            outputs[way] = layer(hidden, index, weights).detach().float()
            with torch.no_grad():
                seconds[way] = card.seconds(partial(layer, hidden, index, weights))
        for way in list(seconds)[1:]:
            name = "ours" if way == BY_PAIRS else way
            error = (outputs[way] - outputs["eager"]).norm() / outputs["eager"].norm()
            yield Figure(f"{tokens} tokens, {name}: relative error to eager", float(error), "", at_most=0.02)
            yield Figure(f"{tokens} tokens, {name}: time over eager", seconds[way] / seconds["eager"])
        best = min(time for way, time in seconds.items() if way != BY_PAIRS)
        yield Figure(f"{tokens} tokens, ours: time over the best", seconds[BY_PAIRS] / best, at_most=1.1)


@section(
    "Experts in 4 bits",
    "Two layers of the same shape, 4 rows of 256 tokens, forward and backward to the embeddings.",
    60,
    "Needs bitsandbytes; without it the section is empty.",
)
def quantized(card: Card) -> Iterator[Figure]:
    """Time and memory of nf4 experts over bf16's."""
    if find_spec("bitsandbytes") is None:
        return
    base = card.qwen(2)
    ids = torch.randint(3, 250, (4, 256), generator=torch.Generator().manual_seed(0)).to(card.device)
    inputs = base.model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> Tensor:
        logits: Tensor = base.model(inputs_embeds=inputs, use_cache=False).logits
        logits[:, -8:].float().mean().backward()
        return logits.detach()[:, -8:].float()

    plain, before = card.seconds(step), step()
    for name in quantizable(base.model):
        owner, _, own = name.rpartition(".")
        module = base.model.get_submodule(owner)
        values = QuantizedTensor.quantize(getattr(module, own).data, "nf4")
        setattr(module, own, nn.Parameter(values, requires_grad=False))
    yield Figure("time of a step: nf4 over bf16", card.seconds(step) / plain, at_most=1.5)
    yield Figure("relative change of the logits", float((step() - before).norm() / before.norm()), "")
    yield Figure("memory above codes and weights", card.above(step), "GB")
    yield from card.profiled(step, "a step in nf4")


@section(
    "Sampling",
    "One step of 16 answers, each with a generator of its own, from a vocabulary of 151,936; temperature 0.7.",
    20,
)
def sampling(card: Card) -> Iterator[Figure]:
    """Milliseconds to draw the tokens of one step."""
    logits = 3 * torch.randn(16, 300 if card.tiny else 151_936, generator=torch.Generator().manual_seed(0))
    logits = logits.to(card.device)
    for top_p in (1.0, 0.9):
        answers = [
            Decoding(byte_tokenizer(), {0}, Sampling(max_new_tokens=10, temperature=0.7, top_p=top_p, seed=i))
            for i in range(len(logits))
        ]
        took = card.seconds(lambda: [one.draw(own) for one, own in zip(answers, logits, strict=True)])  # noqa: B023
        yield Figure(f"top_p {top_p}: all draws of a step", 1e3 * took, "ms")
