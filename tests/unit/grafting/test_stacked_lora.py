"""A frozen delta of any rank equals its merge into the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flexperts.errors import GraftError
from flexperts.moe.attention import attention_linears
from flexperts.parts.stacked_lora import StackedLora
from flexperts.testing import tiny_model

SCALE = 0.7
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def factors_for(model: Any, names: list[str]) -> Factors:
    stream = torch.Generator().manual_seed(1)
    made = {}
    for rank, name in enumerate(names, start=1):
        linear = model.get_submodule(name)
        A = torch.randn(rank, linear.in_features, generator=stream)
        made[name] = A, 0.1 * torch.randn(linear.out_features, rank, generator=stream)
    return made


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_delta_equals_its_merge(ids: torch.Tensor) -> None:
    model = tiny_model()
    before = logits(model, ids)
    factors = factors_for(model, attention_linears(model))
    stacked = StackedLora(model, factors, SCALE).attach()
    with_delta = logits(model, ids)
    with stacked.disabled():
        assert torch.equal(logits(model, ids), before)
    stacked.detach()
    assert torch.equal(logits(model, ids), before)
    for name, (A, B) in factors.items():
        model.get_submodule(name).weight.add_(SCALE * B @ A)
    torch.testing.assert_close(with_delta, logits(model, ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_delta, before, rtol=1e-3)


def test_delta_adds_to_a_peft_wrapper_and_trains_nothing(ids: torch.Tensor) -> None:
    base = tiny_model()
    names = attention_linears(base)[:2]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    before, module = logits(model, ids), model.get_submodule(f"base_model.model.{names[0]}")
    A, B = torch.ones(1, 32), torch.ones(32, 1)
    hidden = torch.arange(64.0).reshape(2, 32)
    plain = module(hidden)
    stacked = StackedLora(model, {f"base_model.model.{names[0]}": (A, B)}, 0.5).attach()
    torch.testing.assert_close(module(hidden), plain + 0.5 * hidden.sum(-1, keepdim=True))
    assert not torch.equal(logits(model, ids), before)
    assert not list(stacked.parameters())
    assert len(list(stacked.buffers())) == 2


def test_delta_computes_in_the_type_of_the_output(ids: torch.Tensor) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    factors = factors_for(model, attention_linears(model))
    StackedLora(model, factors).attach()
    assert logits(model, ids).dtype == torch.bfloat16


def test_no_factors_hang_nothing(ids: torch.Tensor) -> None:
    model = tiny_model()
    assert list(StackedLora(model, {}).hooks()) == []


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model()
    name = attention_linears(model)[0]
    with pytest.raises(GraftError, match="has no such module"):
        StackedLora(model, {"model.nowhere": (torch.ones(1, 32), torch.ones(32, 1))})
    with pytest.raises(GraftError, match=r"gets A \[2, 32\] and B \[32, 1\]"):
        StackedLora(model, {name: (torch.ones(2, 32), torch.ones(32, 1))})


def test_a_delta_is_filled_after_it_was_hung_on(ids: torch.Tensor) -> None:
    model = tiny_model()
    factors = factors_for(model, attention_linears(model))
    empty = {name: (A[:0], B[:, :0]) for name, (A, B) in factors.items()}
    before = logits(model, ids)
    late = StackedLora(model, empty, SCALE).attach()
    assert torch.equal(logits(model, ids), before)
    late.load(factors)
    filled = logits(model, ids)
    late.detach()
    StackedLora(model, factors, SCALE).attach()
    assert torch.equal(filled, logits(model, ids))


def test_factors_that_do_not_fit_are_not_loaded() -> None:
    model = tiny_model()
    first, second = attention_linears(model)[:2]
    (A, B) = factors_for(model, [first])[first]
    late = StackedLora(model, {first: (A, B)})
    with pytest.raises(GraftError, match="no delta here"):
        late.load({second: (A, B)})
    with pytest.raises(GraftError, match="it maps"):
        late.load({first: (A[:, :-1], B)})
