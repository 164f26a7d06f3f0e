"""A shared and a personal bottleneck beside each MoE layer: every family, against the formula by hand."""

from __future__ import annotations

from typing import Any

import torch

from flexperts.moe.experts import find_experts
from flexperts.parts.gated_adapters import GatedAdapters
from flexperts.testing import run_expert, tiny_model


def adapters_of(model: Any, **settings: Any) -> GatedAdapters:
    return GatedAdapters(find_experts(model), **{"rank": 3, "alpha": 6.0, "gate_width": 5, **settings})


def disturb(adapters: GatedAdapters) -> None:
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_untrained_is_the_base_bit_for_bit_and_up_learns_first(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, ids)
    adapters = adapters_of(model).attach()
    assert torch.equal(logits(model, ids), before)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0) == name.endswith(".up"), name
    assert all(p.grad is None for p in model.parameters())


def test_names_and_shapes() -> None:
    shapes = {n: tuple(p.shape) for n, p in adapters_of(tiny_model()).named_parameters()}
    one = {"shared.down": (3, 32), "shared.up": (32, 3), "personal.down": (3, 32), "personal.up": (32, 3)}
    one |= {"gate.W1": (5, 32), "gate.W2": (2, 5)}
    assert shapes == {f"layers.model/layers/{i}/mlp/experts.{n}": s for i in (0, 1) for n, s in one.items()}


def test_starts_come_from_the_stream() -> None:
    first, again, other = (
        dict(adapters_of(tiny_model(), generator=torch.Generator().manual_seed(s)).named_parameters())
        for s in (1, 1, 2)
    )
    assert all(torch.equal(p, again[n]) for n, p in first.items())
    assert not any(torch.equal(p, other[n]) for n, p in first.items() if not n.endswith(".up"))
    shared, personal = (first[f"layers.model/layers/0/mlp/experts.{k}.down"] for k in ("shared", "personal"))
    assert not torch.equal(shared, personal)


def test_what_is_added_is_the_formula(family: str) -> None:
    adapters = adapters_of(tiny_model(family))
    disturb(adapters)
    for pair in adapters:
        hidden = torch.randn(6, pair.experts.width, generator=torch.Generator().manual_seed(1))
        p = {n: t.detach() for n, t in pair.named_parameters()}
        with torch.no_grad():
            added = pair(hidden)
        for t, x in enumerate(hidden):
            scores = p["gate.W2"] @ (1 / (1 + torch.exp(-(p["gate.W1"] @ x))))
            a = torch.exp(scores) / torch.exp(scores).sum()
            shared = 2.0 * p["shared.up"] @ (p["shared.down"] @ x)
            personal = 2.0 * p["personal.up"] @ (p["personal.down"] @ x)
            torch.testing.assert_close(added[t], a[0] * shared + a[1] * personal, rtol=1e-4, atol=1e-5)


def test_it_is_added_to_the_layers_output(family: str) -> None:
    model = tiny_model(family)
    adapters = adapters_of(model)
    disturb(adapters)
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    for pair in adapters:
        with torch.no_grad():
            expected = run_expert(pair.experts, 1, hidden, 0.6) + pair(hidden)
            adapters.attach()
            output = run_expert(pair.experts, 1, hidden, 0.6)
            adapters.detach()
        torch.testing.assert_close(output, expected)


def test_gradients_reach_everything_after_a_first_step(model: Any, ids: torch.Tensor) -> None:
    adapters = adapters_of(model).attach()
    disturb(adapters)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_detach_restores_the_base(model: Any, ids: torch.Tensor) -> None:
    before, keys = logits(model, ids), list(model.state_dict())
    adapters = adapters_of(model).attach()
    disturb(adapters)
    assert list(model.state_dict()) == keys
    with adapters.disabled():
        assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(model, ids), before)
    adapters.detach()
    assert torch.equal(logits(model, ids), before)
    assert not any(module._forward_hooks for module in model.modules())
