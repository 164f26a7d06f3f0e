"""Full MoE and FedAvg: every expert trains, is sent whole, and is averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.methods.registry import make_method
from flexperts.training.local import LocalSettings

# The tiny base: 2 layers of 4 experts, hidden 32, intermediate 16, gate and up in one matrix.
EXPERT_VALUES = 2 * 4 * (2 * 16 * 32 + 16 * 32)


def at_rate_10(settings: LocalSettings, **fields: Any) -> LocalSettings:
    return replace(settings, training=settings.training.model_copy(update={"lr": 10.0}), **fields)


def test_all_experts_move_and_are_sent_and_the_router_is_not(take_turn: Any) -> None:
    with take_turn("method.name=moe_fedavg", disturbed=False) as (method, turn):
        frozen = {n: p.clone() for n, p in turn.split.frozen.items()}
        turn = replace(turn, settings=at_rate_10(turn.settings))
        method.receive(turn)
        method.train(turn)
        sent = method.outgoing(turn)
        experts = {n: t for n, t in sent.items() if n.startswith("experts.")}
        assert sum(t.numel() for t in experts.values()) == EXPERT_VALUES
        assert all(not torch.equal(t, turn.received[n]) for n, t in experts.items())
        assert not turn.split.personal
        assert all(torch.equal(p, frozen[n]) for n, p in turn.split.frozen.items())


@pytest.mark.parametrize(("options", "rate"), [("{}", 1.0), ("{rank=2}", 10.0), ("{expert_lr=3.0}", 3.0)])
def test_experts_step_at_their_own_rate(take_turn: Any, options: str, rate: float) -> None:
    """SGD without clipping: one step moves a weight by rate x gradient; LoRA's rate is 10."""
    with take_turn("method.name=moe_fedavg", f"method.options={options}") as (method, turn):
        method.receive(turn)
        moved: dict[str, float] = {}
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in turn.split.shared.items():
            parameter.register_hook(lambda g, n=name: gradients.update({n: gradients.get(n, 0) + g.double()}))
        method.train(replace(turn, settings=at_rate_10(turn.settings, steps=1)))
        for name, parameter in turn.split.shared.items():
            if name in gradients and gradients[name].abs().max() > 1e-5:
                at = gradients[name].abs().argmax()
                step = (turn.received[name].double() - parameter.detach().double()).flatten()[at]
                moved[name] = float(step / gradients[name].flatten()[at])
        assert {n.split(".")[0] for n in moved} == {"base_model", "experts"}
        for name, ratio in moved.items():
            expected = rate if name.startswith("experts.") else 10.0
            assert ratio == pytest.approx(expected, rel=2e-2), name


def test_a_run_sends_every_expert_in_both_directions(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = recipe("method.name=moe_fedavg", "training.local_steps=1", "evaluation.max_new_tokens=2")
    summary = run_federation(config, tmp_path / "run")
    for direction in ("uplink", "downlink"):
        assert summary["bytes"][f"{direction}_per_client_per_round"] > 4 * EXPERT_VALUES
    assert summary["mean"]["nll"]["global"] != summary["mean"]["nll"]["zero_shot"]
    assert summary["mean"]["nll"]["personalized"] is None


def test_a_rank_below_one_is_refused(recipe: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="rank"):
        make_method(recipe("method.name=moe_fedavg", "method.options={rank=0}").method)
