"""Experts on a card: few pairs batched, many grouped, and the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flexperts.moe import dispatch
from flexperts.moe.dispatch import BY_PAIRS
from flexperts.moe.experts import find_experts
from flexperts.testing import tiny_model


@torch.no_grad()
def test_experts_by_pairs_are_the_same_bits_on_a_cpu_and_batched_ones_the_same_logits(
    family: str, ids: torch.Tensor
) -> None:
    model = tiny_model(family)
    before = model(ids, use_cache=False).logits
    model.set_experts_implementation(BY_PAIRS)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    model.set_experts_implementation("batched_mm")
    torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "tokens", "way"), [("meta", 1, "batched"), ("meta", 2, "grouped"), ("cpu", 1, "grouped")]
)
def test_a_card_takes_the_batched_way_for_at_most_half_as_many_pairs_as_experts(
    device: str, tokens: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("batched", "grouped"):

        def noted(_experts: nn.Module, hidden: Tensor, *_: Tensor, name: str = name) -> Tensor:
            taken.append(name)
            return hidden

        monkeypatch.setattr(dispatch, f"{name}_mm_experts_forward", noted)
    model = tiny_model("qwen2_moe")
    model.set_experts_implementation(BY_PAIRS)
    experts = find_experts(model)[0]
    assert experts.num_experts == 4
    hidden = torch.zeros(tokens, experts.width, device=device)
    routing = torch.zeros(tokens, 2, dtype=torch.long, device=device)
    experts.module(hidden, routing, routing.float())
    assert taken == [way]
