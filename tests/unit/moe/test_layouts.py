"""The layouts of routed experts: how each is found, read, hooked and watched, against the models' own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DbrxConfig,
    NllbMoeConfig,
    NllbMoeModel,
    SwitchTransformersConfig,
    SwitchTransformersModel,
)
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

from flexperts.costs.models import Description, meta_base
from flexperts.costs.plan import model_facts
from flexperts.errors import ModelError
from flexperts.moe.attention import attention_linears
from flexperts.moe.batched import BatchedExperts
from flexperts.moe.experts import LAYOUTS, find_experts
from flexperts.moe.flat import FlatExperts
from flexperts.moe.fused import FusedExperts, FusedExpertsWithIdentities
from flexperts.moe.layout import LayerExperts
from flexperts.moe.parallel import ParallelExperts
from flexperts.parts.grafts import Graft, Grafts
from flexperts.selection.selection import reconstruction_scores
from flexperts.testing import FAMILIES, run_expert, tiny_model

OWN: dict[str, type[LayerExperts]] = {
    "dbrx": FlatExperts,
    "jetmoe": ParallelExperts,
    "llama4_text": BatchedExperts,
    "longcat_flash": FusedExpertsWithIdentities,
}
"""Families whose layout is not the fused one of all others."""
IDS = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


def states(experts: LayerExperts, tokens: int = 13) -> Tensor:
    return torch.randn(tokens, experts.width, generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def block_of(model: Any, experts: LayerExperts) -> Any:
    return model.get_submodule(experts.block)


def routing(model: Any, experts: LayerExperts, hidden: Tensor) -> Tensor:
    """Return the weight of each choice for each token, ``[T, N + identities]``, from the model's own router."""
    block = block_of(model, experts)
    match experts:
        case BatchedExperts():
            return block.router(hidden)[0]
        case ParallelExperts():
            top = block.router(hidden)[-1].topk(block.router.top_k)
            index, weights = top.indices, top.values.softmax(-1)
        case FlatExperts():
            weights, index = block.route_tokens_to_experts(block.router(hidden))
        case FusedExpertsWithIdentities():
            _, weights, index = block.router(hidden)
        case _:
            _, weights, index = block.gate(hidden)
    return torch.zeros(len(hidden), experts.num_experts + experts.num_identities).scatter(1, index, weights)


def routed_output(model: Any, experts: LayerExperts, hidden: Tensor) -> Tensor:
    """Return F(x) ``[T, D]``: what the model's block gives, without what is no routed expert's."""
    block = block_of(model, experts)
    match experts:
        case BatchedExperts():
            return block(hidden[None])[0] - block.shared_expert(hidden)
        case ParallelExperts():
            return block(hidden[None])[0] - block.bias
        case _:
            return block(hidden[None])[0]


def watched(model: Any, experts: LayerExperts, hidden: Tensor) -> list[tuple[Tensor, ...]]:
    """Return what ``watch`` tells when the block runs on ``hidden [T, D]``."""
    calls: list[tuple[Tensor, ...]] = []
    handles = list(experts.watch(lambda *call: calls.append(call)))
    block_of(model, experts)(hidden[None])
    for handle in handles:
        handle.remove()
    return calls


def test_every_family_has_one_layout_and_only_four_have_their_own() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        found = find_experts(model)
        assert {type(e) for e in found} == {OWN.get(family, FusedExperts)}, family
        for experts in found:
            parent = model.get_submodule(experts.name.rpartition(".")[0])
            fits = [layout for layout in LAYOUTS if layout.recognise(experts.name, experts.module, parent)]
            assert fits == [type(experts)], family


def test_reading_an_expert_and_running_it_is_what_the_model_computes(model: Any) -> None:
    for experts in find_experts(model):
        assert (experts.num_experts, experts.width, experts.dtype) == (4, 32, torch.float32)
        hidden = states(experts)
        for index in range(experts.num_experts):
            mine, weights = experts.run(hidden, experts.expert(index)), experts.expert(index)
            torch.testing.assert_close(mine, run_expert(experts, index, hidden), rtol=2e-5, atol=1e-7)
            assert not any(t.requires_grad for _, t in weights.items())


def test_what_is_read_is_a_view_where_the_layout_allows_it(family: str, model: Any) -> None:
    for experts in find_experts(model):
        stored = {p.untyped_storage().data_ptr() for p in experts.stored}
        weights = experts.expert(2)
        assert weights.down.untyped_storage().data_ptr() in stored
        # Gate and up of dbrx lie in two tensors.
        assert (weights.up.untyped_storage().data_ptr() in stored) is (family != "dbrx")


def test_stored_is_every_experts_tensor_and_nothing_else(model: Any) -> None:
    for experts in find_experts(model):
        one = sum(t.numel() for _, t in experts.expert(0).items())
        idle = experts.num_identities * experts.expert(0).up.numel()
        assert sum(p.numel() for p in experts.stored) == experts.num_experts * one + idle


def test_watching_tells_input_routing_and_the_routed_output_alone(model: Any) -> None:
    for experts in find_experts(model):
        hidden = states(experts)
        [(seen, index, weights, output)] = watched(model, experts, hidden)
        assert torch.equal(seen, hidden)
        assert index.shape == weights.shape == (13, 2)
        by_choice = torch.zeros(13, experts.num_experts + experts.num_identities).scatter(1, index, weights)
        torch.testing.assert_close(by_choice, routing(model, experts, hidden))
        torch.testing.assert_close(output, routed_output(model, experts, hidden), rtol=1e-4, atol=1e-6)
        assert not watched_hooks(model)


def watched_hooks(model: Any) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_term_is_added_to_what_the_block_gives(model: Any) -> None:
    for experts in find_experts(model):
        hidden, block = states(experts), block_of(model, experts)
        before = block(hidden[None])
        handle = experts.add(lambda x: 3 * x)
        after = block(hidden[None])
        handle.remove()
        with_none = experts.add(lambda x: None)
        untouched = block(hidden[None])
        with_none.remove()
        if isinstance(before, tuple):
            assert torch.equal(before[1], after[1])
            before, after, untouched = before[0], after[0], untouched[0]
        torch.testing.assert_close(after, before + 3 * hidden.view(before.shape))
        assert torch.equal(untouched, before)


@pytest.mark.parametrize("rank", [3, "full"])
def test_untrained_graft_at_gate_g_is_the_models_own_expert_with_weight_g(model: Any, rank: Any) -> None:
    gate = float(torch.sigmoid(torch.tensor(0.7)))
    for experts in find_experts(model):
        graft, hidden = Graft(experts, (2,), rank, 8.0, 0.7, torch.Generator()), states(experts)
        with torch.no_grad():
            expected = run_expert(experts, 2, hidden, gate)
            torch.testing.assert_close(graft(hidden), expected, rtol=2e-5, atol=1e-6)


def test_where_the_score_multiplies_the_input_a_graft_sees_the_input_itself() -> None:
    """The term depends on x alone: a router that scores everything with 0 leaves shared expert plus graft."""
    model = tiny_model("llama4_text")
    [experts, *_] = find_experts(model)
    block, hidden = block_of(model, experts), states(experts)
    grafts = Grafts([experts], {experts.name: (1,)}, rank=2, gate_bias=0.3).attach()
    scores = (torch.zeros(13, 4), torch.zeros(13, 4))
    with mock.patch.object(block.router, "forward", return_value=scores), torch.no_grad():
        expected = block.shared_expert(hidden) + next(iter(grafts))(hidden)
        torch.testing.assert_close(block(hidden[None])[0], expected)


@pytest.mark.parametrize("rank", [2, "full"])
def test_grafts_train_and_come_off_again(model: Any, rank: Any) -> None:
    before, experts = logits(model), find_experts(model)
    grafts = Grafts(experts, {e.name: (1, 3) for e in experts}, rank=rank).attach()
    with torch.no_grad():
        for parameter in grafts.parameters():
            parameter.add_(0.05)
    assert not torch.equal(logits(model), before)
    with grafts.disabled():
        assert torch.equal(logits(model), before)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in grafts.parameters())
    assert all(p.grad is None for p in model.parameters())
    grafts.detach()
    assert torch.equal(logits(model), before)
    assert not watched_hooks(model)


def test_selection_scores_the_routed_output(model: Any) -> None:
    experts = find_experts(model)
    hidden: dict[str, Tensor] = {}
    handles = [
        block_of(model, e).register_forward_pre_hook(lambda _m, args, name=e.name: hidden.update({name: args[0]}))
        for e in experts
    ]
    layers = reconstruction_scores(
        lambda batch: model(**batch),
        experts,
        [{"input_ids": IDS, "attention_mask": MASK}],
        max_tokens=10**6,
        generator=torch.Generator(),
    )
    for handle in handles:
        handle.remove()
    for e, layer in zip(experts, layers, strict=True):
        x = hidden[e.name].reshape(-1, e.width)
        with torch.no_grad():
            target = routed_output(model, e, x)
            errors = [(target - run_expert(e, i, x)).double().square().sum() for i in range(4)]
        torch.testing.assert_close(layer.errors, torch.stack(errors), rtol=1e-4, atol=1e-9)
        assert layer.tokens == IDS.numel()


def test_experts_of_attention_are_left_alone() -> None:
    model = tiny_model("jetmoe")
    found = find_experts(model)
    assert [e.name for e in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    sites = attention_linears(model)
    get_peft_model(model, LoraConfig(target_modules=sites))
    assert [e.name for e in find_experts(model)] == [e.name for e in found]
    grafts = Grafts(found, {e.name: (0,) for e in found}).attach()
    hooked = [name for name, m in model.named_modules() if m._forward_hooks]
    assert hooked == [e.name for e in found]
    grafts.detach()


def switch() -> nn.Module:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_experts": 4}
    layers = ("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers")
    return SwitchTransformersModel(SwitchTransformersConfig(**sizes, **dict.fromkeys(layers, 1)))


def nllb() -> nn.Module:
    sizes = {"vocab_size": 32, "d_model": 16, "num_experts": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    ones = ("layers", "attention_heads", "sparse_step")
    return NllbMoeModel(
        NllbMoeConfig(**sizes, **{f"{side}_{one}": 1 for side in ("encoder", "decoder") for one in ones})
    )


@pytest.mark.parametrize(("make", "kind"), [(switch, "SwitchTransformersExperts"), (nllb, "NllbMoeExperts")])
def test_experts_in_a_module_dict_are_refused_by_name(make: Callable[[], nn.Module], kind: str) -> None:
    with pytest.raises(ModelError, match=rf"\({kind}\).*one that flexperts knows"):
        find_experts(make())


class Towered(nn.Module):
    """A model with a tower for images that has attention and experts of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.language_model = tiny_model("qwen3_moe").model, tiny_model("qwen3_moe").model

    def get_decoder(self) -> nn.Module:
        return self.language_model


def test_towers_stay_as_they_are() -> None:
    model, alone = Towered(), tiny_model("qwen3_moe").model
    assert [e.name for e in find_experts(model)] == [f"language_model.{e.name}" for e in find_experts(alone)]
    assert attention_linears(model) == [f"language_model.{name}" for name in attention_linears(alone)]


def test_a_plan_counts_only_experts_as_idle() -> None:
    """DBRX, whose counts stand in an inner config and whose matrices are flat: 132 billion, 36 of them active."""
    attention = DbrxAttentionConfig(kv_n_heads=8, clip_qkv=8.0, rope_theta=5e5)
    ffn = DbrxFFNConfig(hidden_size=6144, ffn_hidden_size=10752, moe_num_experts=16, moe_top_k=4)
    sizes = {"d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100_352, "tie_word_embeddings": False}
    description = Description("dbrx", DbrxConfig(attn_config=attention, ffn_config=ffn, **sizes))
    facts = model_facts(description, meta_base(description, "bfloat16"))
    assert facts.parameters / 1e9 == pytest.approx(132, rel=0.01)
    assert facts.active_parameters / 1e9 == pytest.approx(36, rel=0.02)
    assert facts.flops_per_token == pytest.approx(2 * facts.active_parameters, rel=0.02)
