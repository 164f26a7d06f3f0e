"""Layers that are computed in fewer operations give their own numbers, and others run unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn

from flexperts.config.model import LoraConfig
from flexperts.modeling import joined_lora
from flexperts.modeling.joined_lora import JoinedLora
from flexperts.modeling.lora import LoraAdapters
from flexperts.testing import tiny_model

IDS = torch.arange(36).reshape(3, 12)
BF16 = 2.0**-7
"""Relative tolerance: one rounding to bf16 more or less."""


def adapted(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> LoraAdapters:
    base = tiny_model(seed=1).to(dtype)
    base.requires_grad_(False)
    personal = settings.pop("personal", False)
    config = LoraConfig.model_validate({"rank": 3, "alpha": 9.0, "projections": ()} | settings)
    lora = LoraAdapters(base, config, seed=5, personal=personal)
    stream = torch.Generator().manual_seed(9)
    for _, parameter in sorted(lora.parameters().items()):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=stream))
    return lora


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each joint computation."""
    seen: list[int] = []
    original = joined_lora._Products

    class Noted(original):  # type: ignore[valid-type,misc]
        @staticmethod
        def forward(ctx: Any, x: Tensor, dtype: Any, frozen: Any, scales: Any, *factors: Tensor) -> Any:
            seen.append(len(frozen))
            return original.forward(ctx, x, dtype, frozen, scales, *factors)

    monkeypatch.setattr(joined_lora, "_Products", Noted)
    return seen


def output_and_gradients(lora: LoraAdapters, dtype: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a forward and a backward pass, under autocast to ``dtype`` if there is one."""
    lora.model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = lora.model(input_ids=IDS).logits.float()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {n: p.grad.clone() for n, p in lora.parameters().items() if p.grad is not None}


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# LoRA


@pytest.mark.parametrize("both", [False, True])
def test_joined_layers_compute_what_peft_computes(both: bool, counted: list[int]) -> None:
    """Both are compared with the same model in fp64-like precision: joined layers are as close as PEFT's."""
    lora, exact = adapted(personal=both), adapted(torch.float32, personal=both)
    names = {"shared": 1.0} | ({"personal": 1.0} if both else {})
    with lora.use(**names), exact.use(**names):
        expected, exact_grads = output_and_gradients(exact, None)
        assert not counted
        output_and_gradients(lora, torch.bfloat16)
        counted.clear()  # the first pass finds that o, of the same width, has another input
        output, grads = output_and_gradients(lora, torch.bfloat16)
        assert counted == [3, 1, 3, 1]
        for joined in reversed(lora._joined):
            joined.remove()
        peft, peft_grads = output_and_gradients(lora, torch.bfloat16)
    assert difference(output, expected) < 1.1 * difference(peft, expected) + 1e-3
    assert grads.keys() == peft_grads.keys() == exact_grads.keys()
    for name in grads:
        ours, theirs = (difference(g[name], exact_grads[name]) for g in (grads, peft_grads))
        assert ours < 1.5 * theirs + 1e-2, name


def test_fp32_and_inference_are_left_to_peft(counted: list[int]) -> None:
    lora = adapted(torch.float32)
    output, grads = output_and_gradients(lora, None)
    with torch.no_grad():
        output_of(lora)
    for joined in reversed(lora._joined):
        joined.remove()
    peft, peft_grads = output_and_gradients(lora, None)
    assert torch.equal(output, peft)
    assert all(torch.equal(grads[n], peft_grads[n]) for n in grads)
    assert not counted


def test_no_adapter_dropout_and_weights_are_left_to_peft(counted: list[int]) -> None:
    lora, dropping = adapted(), adapted(dropout=0.5)
    dropping.model.train()
    with lora.use():
        plain = output_of(lora)
    assert torch.equal(plain, tiny_model(seed=1).bfloat16()(input_ids=IDS).logits)
    with lora.use(shared=0.5):
        assert not torch.equal(output_of(lora), plain)
    assert not torch.equal(output_of(dropping), output_of(dropping))
    assert not counted


def test_new_factors_are_used_at_once(counted: list[int]) -> None:
    lora = adapted()
    before = output_of(lora)
    for parameter in lora.parameters().values():
        parameter.data.mul_(2)
    assert difference(output_of(lora), before) > 0.01
    assert counted


def test_layers_with_other_inputs_are_not_joined(counted: list[int]) -> None:
    """The first call computes one layer too many; later ones do not."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    two = Two().requires_grad_(False)
    two = inject_adapter_in_model(
        PeftLoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False), two
    )
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        expected = two(x)
        JoinedLora(two, [two.first, two.second])
        found = [two(x) for _ in range(3)]
    assert counted == [2, 1, 1, 1, 1, 1]
    assert all(difference(one.detach().float(), expected.detach().float()) < BF16 for one in found)


def output_of(lora: LoraAdapters) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        output: Tensor = lora.model(input_ids=IDS).logits
    return output.detach()
