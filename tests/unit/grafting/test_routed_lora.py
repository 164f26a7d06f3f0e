"""LoRA experts behind a linear router: the formula by hand on one Linear layer, starts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flexperts.errors import GraftError
from flexperts.parts.routed_lora import RoutedLora

SITE = "body.proj"


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    body = nn.ModuleDict({"proj": nn.Linear(6, 5), "norm": nn.LayerNorm(5)})
    return nn.ModuleDict({"body": body}).requires_grad_(False).eval()


def routed(model: nn.Module, **settings: Any) -> RoutedLora:
    return RoutedLora(model, [SITE], **{"experts": 3, "slots": 5, "rank": 2, "alpha": 3.0, "seed": 7, **settings})


def disturb(part: RoutedLora) -> dict[str, torch.Tensor]:
    """Give every parameter values; return them by short names."""
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=stream))
    return parameters(part)


def parameters(part: RoutedLora) -> dict[str, torch.Tensor]:
    return {n.removeprefix("sites.body/proj."): p.detach() for n, p in part.named_parameters()}


HIDDEN = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("slots", "best"),
    [([0, 1, 2], 3), ([0, 1], 2), ([0, 1, 2, 0, 0], 3), ([2, 1, 1, 1], 2), ([0, 2, 0, 2, 0], 1), ([1], 1)],
)
def test_output_is_the_formula(model: Any, slots: list[int], best: int) -> None:
    part = routed(model)
    p, plain = disturb(part), model.body.proj(HIDDEN)
    part.activate(slots, best)
    part.attach()
    output = model.body.proj(HIDDEN).detach()
    for at in [(i, j) for i in range(2) for j in range(3)]:
        x = HIDDEN[at]
        scores = [float((p["router"][k] @ x).exp()) for k in range(len(slots))]
        kept = sorted(range(len(slots)), key=lambda k, s=scores: -s[k])[:best]
        delta = torch.zeros(5)
        for k in kept:
            expert = f"experts.{slots[k]}"
            weight = scores[k] / sum(scores[other] for other in kept)
            delta = delta + weight * (p[f"{expert}.B"] @ (p[f"{expert}.A"] @ x))
        torch.testing.assert_close(output[at], plain[at] + 1.5 * delta, rtol=1e-4, atol=1e-5)


def test_starts_are_the_same_everywhere_and_add_nothing(model: Any) -> None:
    before = model.body.proj(HIDDEN)
    one, fewer = parameters(routed(model)), parameters(routed(model, experts=2, slots=5))
    assert all(torch.equal(tensor, one[name]) for name, tensor in fewer.items())
    assert not torch.equal(one["router"], parameters(routed(model, seed=8))["router"])
    assert len({tuple(one[f"experts.{e}.A"].flatten().tolist()) for e in range(3)}) == 3
    part = routed(model).attach()
    assert torch.equal(model.body.proj(HIDDEN), before)
    disturb(part)
    assert not torch.equal(model.body.proj(HIDDEN), before)
    with part.disabled():
        assert torch.equal(model.body.proj(HIDDEN), before)
    part.detach()
    assert torch.equal(model.body.proj(HIDDEN), before)


def test_gradients_reach_what_is_used_and_nothing_else(model: Any) -> None:
    part = routed(model).attach()
    disturb(part)
    for slots, best, names in (([0, 2, 0], 2, {"0.A", "0.B", "2.A", "2.B"}), ([1], 1, {"1.A", "1.B"})):
        part.activate(slots, best)
        part.zero_grad(set_to_none=True)
        model.body.proj(HIDDEN).square().sum().backward()
        grads = {n.removeprefix("sites.body/proj."): p.grad for n, p in part.named_parameters()}
        reached = {n.removeprefix("experts.") for n, g in grads.items() if g is not None and g.abs().sum() > 0}
        assert reached == names | ({"router"} if len(slots) > 1 else set())
        router = grads["router"]
        assert (router is None) == (len(slots) == 1)
        assert router is None or router[len(slots) :].count_nonzero() == 0
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_for_the_experts_in_training(model: Any) -> None:
    """With every input dropped the experts add nothing; out of training nothing is dropped."""
    part = routed(model, dropout=1.0)
    disturb(part)
    plain = model.body.proj(HIDDEN)
    part.attach()
    assert not torch.equal(model.body.proj(HIDDEN), plain)
    model.train()
    assert torch.equal(model.body.proj(HIDDEN), plain)


def test_what_does_not_fit_is_refused(model: Any) -> None:
    part = routed(model)
    for slots, best in (([3], 1), ([0, -1], 1), ([], 1), ([0, 1], 3), ([0, 1], 0), ([0] * 6, 1)):
        with pytest.raises(GraftError, match="there are 3 experts and 5 router rows"):
            part.activate(slots, best)
    assert (part.slots, part.best) == ((0, 1, 2), 3)
    with pytest.raises(GraftError, match="it must be a Linear layer"):
        RoutedLora(model, ["body.norm"], experts=1, slots=1)
    with pytest.raises(GraftError, match="has no such module"):
        RoutedLora(model, ["body.other"], experts=1, slots=1)
