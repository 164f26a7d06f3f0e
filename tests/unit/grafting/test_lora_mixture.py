"""The mixture's formula, its streams and its balance loss, by hand on one Linear layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flexperts.errors import GraftError
from flexperts.moe.attention import attention_linears
from flexperts.parts.lora_mixture import LoraMixture
from flexperts.testing import tiny_model

SITE = "body.proj"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.ModuleDict({"proj": nn.Linear(6, 5), "norm": nn.LayerNorm(5)})
    return nn.ModuleDict({"body": body}).requires_grad_(False).eval()


def mixture_of(model: nn.Module, held: tuple[int, ...] = (1, 4, 6), **settings: Any) -> LoraMixture:
    return LoraMixture(model, {SITE: held}, **{"pool": 8, "rank": 2, "alpha": 3.0, "seed": 7, **settings})


def disturb(mixture: LoraMixture) -> None:
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=stream))


def parameters(mixture: LoraMixture) -> dict[str, torch.Tensor]:
    return {n.removeprefix("sites.body/proj."): p.detach() for n, p in mixture.named_parameters()}


def routing(p: dict[str, torch.Tensor], x: torch.Tensor, held: tuple[int, ...]) -> dict[int, float]:
    score = {e: math.exp(float((p[f"experts.{e}.A"] @ x) @ (p["projection"] @ x)) / math.sqrt(2)) for e in held}
    return {e: s / sum(score.values()) for e, s in score.items()}


@pytest.mark.parametrize("held", [(1, 4, 6), (6, 1), (3,), (0, 1, 2, 3, 4)])
def test_output_is_the_formula(model: Any, held: tuple[int, ...]) -> None:
    mixture = mixture_of(model, held)
    disturb(mixture)
    p, hidden = parameters(mixture), torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    plain = model.body.proj(hidden)
    mixture.attach()
    output = model.body.proj(hidden).detach()
    for at in [(i, j) for i in range(2) for j in range(3)]:
        x = hidden[at]
        shares = routing(p, x, held)
        best = sorted(shares, key=lambda e: -shares[e])[:2]
        delta = p["shared.B"] @ (p["shared.A"] @ x)
        for e in best:
            weight = shares[e] / sum(shares[b] for b in best)
            delta = delta + weight * (p[f"experts.{e}.B"] @ (p[f"experts.{e}.A"] @ x))
        torch.testing.assert_close(output[at], plain[at] + 1.5 * delta, rtol=1e-4, atol=1e-5)


def test_names_hold_the_pools_numbers(model: nn.Module) -> None:
    mixture = mixture_of(model, (6, 1))
    experts = {f"experts.{e}.{f}" for e in (6, 1) for f in "AB"}
    assert parameters(mixture).keys() == {"shared.A", "shared.B", "projection"} | experts
    assert mixture.held == {SITE: (6, 1)}


def test_an_expert_starts_equal_on_every_client_that_holds_it(model: nn.Module) -> None:
    one, other = parameters(mixture_of(model, (1, 4))), parameters(mixture_of(model, (6, 4, 0)))
    for name in ("experts.4.A", "shared.A", "projection"):
        assert torch.equal(one[name], other[name])
    starts = [one["experts.1.A"], one["experts.4.A"], other["experts.6.A"], one["shared.A"], one["projection"]]
    assert len({tuple(t.flatten().tolist()) for t in starts}) == len(starts)
    assert not torch.equal(one["shared.A"], parameters(mixture_of(model, (1, 4), seed=8))["shared.A"])
    assert all(t.count_nonzero() == 0 for n, t in one.items() if n.endswith(".B"))


def test_untrained_disabled_and_detached_are_the_base_bit_for_bit(model: Any) -> None:
    hidden = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    before = model.body.proj(hidden)
    mixture = mixture_of(model).attach()
    assert torch.equal(model.body.proj(hidden), before)
    disturb(mixture)
    assert not torch.equal(model.body.proj(hidden), before)
    with mixture.disabled():
        assert torch.equal(model.body.proj(hidden), before)
    mixture.detach()
    assert torch.equal(model.body.proj(hidden), before)


def test_gradient_reaches_all_that_the_tokens_use(model: Any) -> None:
    mixture = mixture_of(model).attach()
    disturb(mixture)
    model.train()
    model.body.proj(torch.randn(40, 6, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters())


def test_balance_loss_by_hand_is_a_sum_over_layers_of_both_choices() -> None:
    """The release: E sum_e f_e P_e with f_e over all top-2 choices, added up over the adapted layers."""
    torch.manual_seed(0)
    layers: Any = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(6, 3)]).requires_grad_(False)
    held = {"0": (1, 4, 6), "1": (0, 2, 3, 7), "2": (5, 1)}
    mixture = LoraMixture(layers, held, pool=8, rank=2, seed=7)
    disturb(mixture)
    hidden, expected = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(3)), []
    for name, experts in held.items():
        start = f"sites.{name}."
        p = {n.removeprefix(start): t.detach() for n, t in mixture.named_parameters() if n.startswith(start)}
        shares = [routing(p, x, experts) for x in hidden[0]]
        chosen = [e for s in shares for e in sorted(s, key=lambda e, s=s: -s[e])[:2]]
        E, T = len(experts), len(shares)
        expected.append(E * sum(chosen.count(e) / (2 * T) * sum(s[e] for s in shares) / T for e in experts))
    assert expected[2] == pytest.approx(1.0)  # both experts are always chosen
    assert abs(expected[0] - expected[1]) > 1e-3
    mixture.attach()
    layers.train()
    for layer in layers:
        layer(hidden)
    loss = mixture.balance_loss()
    assert loss.item() == pytest.approx(sum(expected), rel=1e-5)
    loss.backward()
    for name in ("0", "1"):
        projection = mixture.mixture(name).projection
        assert projection.grad is not None
        assert projection.grad.abs().sum() > 0


def test_dropout_is_on_the_experts_input_and_not_on_the_routings(model: Any) -> None:
    """With every input dropped the experts add nothing, and the balance loss is that of the whole input."""
    hidden, losses = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)), []
    plain = model.body.proj(hidden)
    for dropout in (0.0, 1.0):
        mixture = mixture_of(model, dropout=dropout).attach()
        disturb(mixture)
        model.eval()
        assert not torch.equal(model.body.proj(hidden), plain)
        model.train()
        assert torch.equal(model.body.proj(hidden), plain) == (dropout == 1.0)
        losses.append(mixture.balance_loss())
        mixture.detach()
    assert torch.equal(*losses)


def test_balance_loss_is_even_at_one_and_is_forgotten(model: Any) -> None:
    mixture = mixture_of(model, (2,)).attach()
    model.body.proj(torch.ones(3, 6))
    with pytest.raises(GraftError, match="no forward pass in training mode"):
        mixture.balance_loss()
    model.train()
    model.body.proj(torch.ones(3, 6))
    assert mixture.balance_loss().item() == pytest.approx(1.0)
    with pytest.raises(GraftError, match="no forward pass in training mode"):
        mixture.balance_loss()


def gradients_beside_peft(checkpointing: bool) -> dict[str, Any]:
    base = tiny_model()
    names = attention_linears(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=names))
    sites = {f"base_model.model.{n}": [0, 1 + i % 3] for i, n in enumerate(names)}
    mixture = LoraMixture(model, sites, pool=4, rank=2).attach()
    disturb(mixture)
    model.train()
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (loss + mixture.balance_loss()).backward()
    return {n: p.grad for n, p in mixture.named_parameters()}


def test_a_model_trains_with_it_beside_peft_and_checkpointing_changes_no_gradient() -> None:
    plain, recomputed = gradients_beside_peft(False), gradients_beside_peft(True)
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, recomputed[name])


def test_what_does_not_fit_is_refused(model: nn.Module) -> None:
    for wrong in ((), (1, 1), (8,)):
        with pytest.raises(GraftError, match="different numbers from 0 to 7"):
            mixture_of(model, wrong)
    with pytest.raises(GraftError, match="it must be a Linear layer"):
        LoraMixture(model, {"body.norm": [0]}, pool=2)
    with pytest.raises(GraftError, match="has no such module"):
        LoraMixture(model, {"body.other": [0]}, pool=2)
