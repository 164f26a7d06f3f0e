"""Tiny random models and a byte tokenizer, for tests of this package and of code that builds on it.

Nothing in the package imports this module.
"""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from flexperts.errors import ConfigError, did_you_mean
from flexperts.moe.batched import BatchedExperts
from flexperts.moe.layout import LayerExperts
from flexperts.moe.parallel import ParallelExperts

_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TINY = tomllib.loads(resources.files("flexperts").joinpath("tiny_families.toml").read_text(encoding="utf-8"))

_ROUTER_BIAS = re.compile(r"(gate|router)\b.*bias|(correction|expert)_bias")

VOCABULARY: int = _TINY["common"]["vocab_size"]
FAMILIES: dict[str, dict[str, Any]] = _TINY["families"]
"""Model type -> the settings of its tiny config besides the common ones, for every supported MoE language model."""

METHOD_SETTINGS: dict[str, tuple[str, ...]] = {
    "fedlease": ("method.options={warmup_rounds=1}",),
    "scaffold": ("training.optimizer=sgd", "training.lr=0.5"),
}
"""Method -> the overrides without which it refuses to run."""


def tiny_model(
    family: str = "qwen2_moe", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """Return a random MoE causal language model in eval mode, with frozen weights and, where possible, two layers.

    Args:
        family: A key of ``FAMILIES``.
        seed: Seed of the weights.
        dtype: Storage type.
        settings: Config values that replace or extend the family's.

    Raises:
        ConfigError: There is no such family.
    """
    config = AutoConfig.for_model(family, **{**tiny_settings(family), **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        draw_weights(model)
    _keep_in_fp32(model)
    return model.eval().requires_grad_(False)


def tiny_settings(family: str | None = None) -> dict[str, Any]:
    """Return the settings of a family's tiny config; with None, the settings common to all families.

    Raises:
        ConfigError: There is no such family.
    """
    if family is not None and family not in FAMILIES:
        remedy = did_you_mean(family, FAMILIES, f"choose one of its {len(FAMILIES)} keys")
        raise ConfigError(f"family {family!r}", "it must be a key of flexperts.testing.FAMILIES", remedy)
    return {**_TINY["common"], **(FAMILIES[family] if family else {})}


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Draw new values for every matrix, and for every vector that starts as a constant.

    Some families start routers and biases at zero, and also their tables from token id to one of four experts; then
    routing would not depend on the input. Routers' biases are small, so that they do not decide the routing alone.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or parameter.min() == parameter.max():
            nn.init.normal_(parameter, std=1e-5 if _ROUTER_BIAS.search(name) else 0.1)
    for table in model.buffers():
        if table.dim() == 2 and not table.is_floating_point():
            rows, columns = (torch.arange(size) for size in table.shape)
            table.copy_((rows[:, None] + columns) % 4)


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Convert to fp32 what stays in fp32 when a checkpoint is loaded in bf16; some models need it."""
    if model.dtype != torch.float32:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and any(part in name for part in model._keep_in_fp32_modules_strict):
                tensor.data = tensor.data.float()


def run_expert(experts: LayerExperts, index: int, hidden: Tensor, weight: float = 1.0) -> Tensor:
    """Return one expert's weighted output ``[T, D]`` for ``hidden [T, D]``, computed by the model's modules."""
    module, tokens = experts.module, len(hidden)
    if isinstance(experts, BatchedExperts):  # every expert gets T rows; all but this expert's are zero
        rows = hidden.new_zeros(experts.num_experts, tokens, experts.width)
        rows[index] = hidden
        output: Tensor = module(rows.flatten(0, 1)).unflatten(0, (experts.num_experts, -1))[index]
        return weight * output
    if isinstance(experts, ParallelExperts):  # all tokens go to one expert; the block's bias belongs to no expert
        counts = [tokens * (number == index) for number in range(experts.num_experts)]
        order, gates = torch.arange(tokens), hidden.new_full((tokens,), weight)
        with mock.patch.object(module.router, "forward", return_value=(order, order, gates, counts, None)):
            whole: Tensor = module(hidden[None])[0]
        return whole - cast(Tensor, module.bias)
    # Two slots, because one family cannot run with a single slot.
    slots, weights = torch.full((tokens, 2), index), hidden.new_tensor([weight, 0.0]).expand(tokens, 2)
    summed: Tensor = module(hidden, slots, weights)
    return summed.reshape(hidden.shape)


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the 256 bytes and three special tokens; it needs no files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = _CHAT if chat else None
    return tokenizer


def save_tiny_base(
    folder: Path | str, family: str = "qwen2_moe", *, seed: int = 0, chat: bool = True, **settings: Any
) -> Path:
    """Save a tiny model with its tokenizer as a transformers folder, and return the folder."""
    folder = Path(folder)
    tiny_model(family, seed=seed, **settings).save_pretrained(folder)
    byte_tokenizer(chat=chat).save_pretrained(folder)
    return folder
