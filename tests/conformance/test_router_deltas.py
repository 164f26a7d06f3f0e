"""A delta on the router's matrix: every family, against a model whose matrix was changed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from flexperts.errors import ModelError
from flexperts.moe.experts import FusedExperts, find_experts
from flexperts.moe.router import Router, find_router
from flexperts.parts.router_deltas import RouterDeltas
from flexperts.testing import tiny_model


def deltas_of(model: Any) -> RouterDeltas:
    return RouterDeltas(model, find_experts(model))


def disturb(deltas: RouterDeltas) -> None:
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for delta in deltas.parameters():
            delta.add_(0.1 * torch.randn(delta.shape, generator=stream))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_router_is_the_matrix_beside_the_experts(family: str) -> None:
    model = tiny_model(family)
    for experts in find_experts(model):
        router = find_router(model, experts)
        assert router.name.rpartition(".")[0] == experts.name.rpartition(".")[0]
        assert router.name.split(".")[-1] in ("gate", "router")
        assert model.get_submodule(router.name) is router.module
        assert router.weight.shape == (4, 32)


class Layer(nn.Module):
    """A layer with a nested router, a shared expert of the same height and what else is given."""

    def __init__(self, **others: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({"inner": nn.Linear(8, 4)})
        self.experts.num_experts = 4
        self.shared_expert = nn.Linear(8, 4)
        for name, module in others.items():
            self.add_module(name, module)


def test_nested_router_is_found_and_doubt_is_refused() -> None:
    nested = Layer(router=nn.ModuleDict({"proj": nn.Linear(8, 4), "norm": nn.LayerNorm(8)}))
    assert find_router(nested, FusedExperts("experts", nested.experts)) == Router("router.proj", nested.router.proj)
    none = nn.ModuleDict({"mlp": Layer()})
    with pytest.raises(
        ModelError, match="mlp has no router matrix: exactly one matrix named weight must have 4 rows"
    ):
        find_router(none, FusedExperts("mlp.experts", none.mlp.experts))
    two = nn.ModuleDict({"mlp": Layer(gate=nn.Linear(8, 4), other=nn.Linear(8, 4))})
    with pytest.raises(ModelError, match=r"mlp has mlp\.gate, mlp\.other"):
        find_router(two, FusedExperts("mlp.experts", two.mlp.experts))


def test_zero_delta_is_the_base_bit_for_bit(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, ids)
    deltas = deltas_of(model).attach()
    assert [n for n, _ in deltas.named_parameters()] == [
        f"layers.{n.replace('.', '/')}" for n in experts_names(model)
    ]
    assert all(p.dtype == torch.float32 for p in deltas.parameters())
    assert torch.equal(logits(model, ids), before)


def experts_names(model: Any) -> list[str]:
    return [e.name for e in find_experts(model)]


def test_delta_equals_a_router_changed_by_hand(model: Any, ids: torch.Tensor) -> None:
    before, changed = logits(model, ids), copy.deepcopy(model)
    deltas = deltas_of(model)
    disturb(deltas)
    for experts, delta in zip(find_experts(changed), deltas.parameters(), strict=True):
        weight = find_router(changed, experts).weight[: experts.num_experts]  # further rows are of no expert
        weight.copy_((weight.float() + delta.detach()).to(weight.dtype))
    expected = [weight_of(changed, name) for name in experts_names(changed)]
    deltas.attach()
    assert torch.equal(logits(model, ids), logits(changed, ids))
    assert not torch.equal(logits(model, ids), before)
    for name, weight in zip(experts_names(model), expected, strict=True):
        assert torch.equal(deltas.weight(name).detach().to(weight.dtype), weight)
        assert deltas.weight(name).requires_grad
        with deltas.disabled():
            assert torch.equal(deltas.weight(name).to(weight.dtype), weight_of(model, name))
    deltas.detach()
    for name, weight in zip(experts_names(model), expected, strict=True):
        assert torch.equal(deltas.weight(name).detach().to(weight.dtype), weight)


def weight_of(model: Any, name: str) -> torch.Tensor:
    experts = next(e for e in find_experts(model) if e.name == name)
    return find_router(model, experts).weight[: experts.num_experts]


def test_gradient_reaches_every_delta_and_nothing_frozen(model: Any, ids: torch.Tensor) -> None:
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            # phimoe drops logits this far from the best; a token left with one has weight 1 and no gradient.
            module.router_jitter_noise = 1e3
    deltas = deltas_of(model).attach()
    disturb(deltas)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, delta in deltas.named_parameters():
        assert delta.grad is not None, name
        assert delta.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters())
    own = {id(p) for p in deltas.parameters()}
    assert not own & {id(p) for p in model.parameters()}


def test_detach_restores_the_very_same_parameters(model: Any, ids: torch.Tensor) -> None:
    before, named = logits(model, ids), list(model.named_parameters())
    weights = {n: (t.clone(), t.data_ptr()) for n, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    deltas = deltas_of(model).attach()
    disturb(deltas)
    with deltas.disabled():
        assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(model, ids), before)
    deltas.detach()
    assert torch.equal(logits(model, ids), before)
    again = list(model.named_parameters())
    assert [n for n, _ in again] == [n for n, _ in named]
    assert all(p is q and not p.requires_grad for (_, p), (_, q) in zip(again, named, strict=True))
    assert list(model.state_dict()) == list(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name][0])
        assert tensor.data_ptr() == weights[name][1]
    assert [type(m) for m in model.modules()] == kinds


def test_two_sets_of_deltas_take_turns(ids: torch.Tensor) -> None:
    model = tiny_model()
    before = logits(model, ids)
    first = deltas_of(model).attach()
    second = deltas_of(model)
    disturb(second)
    first.detach()
    second.attach()
    assert not torch.equal(logits(model, ids), before)
    second.detach()
    assert torch.equal(logits(model, ids), before)


def test_gradient_checkpointing_changes_no_gradient(family: str, ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family).train()
        for module in model.modules():
            if hasattr(module, "router_jitter_noise"):
                module.router_jitter_noise = 0.0
        deltas = deltas_of(model).attach()
        disturb(deltas)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in deltas.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
