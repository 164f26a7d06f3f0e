"""Ditto: the pull by hand, a global model that knows nothing of the personal one, and both as they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexperts.engines.run import run_federation

IDS = torch.arange(24).reshape(2, 12)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def nothing(*_: Any) -> Iterator[Tensor]:
    yield torch.zeros(())


def test_without_data_v_moves_by_the_pull_alone(take_turn: Any) -> None:
    """Two SGD steps of rate 0.1 on lam/2 ||v - w||^2: v - w shrinks by (1 - 0.1 lam)^2; w stands still."""
    with take_turn("method.name=ditto", "method.options={lam=0.3}", objective=nothing) as (method, turn):
        method.receive(turn)
        v = {n: p.detach().double().clone() for n, p in turn.split.personal.items()}
        w = {n: t.double() for n, t in turn.received.items()}
        method.train(turn)
        for name, start in v.items():
            mirrored = -w[name.removeprefix("personal.")]
            expected = mirrored + (1 - 0.1 * 0.3) ** 2 * (start - mirrored)
            assert (start - mirrored).abs().max() > 0.1
            assert torch.allclose(turn.split.personal[name].detach().double(), expected, atol=1e-6), name
        assert all(torch.equal(p, turn.received[n]) for n, p in turn.split.shared.items())


def test_the_pull_is_to_what_was_received_and_not_to_what_was_trained(take_turn: Any) -> None:
    """lam = 1 / rate puts v, in one step without data, where w was before training."""
    with take_turn("method.name=ditto", "method.options={lam=10}") as (method, turn):
        method.receive(turn)
        turn = replace(turn, settings=replace(turn.settings, steps=1))
        fit, calls = turn.fit, []
        turn.fit = lambda **k: calls.append(k) or fit(**k, **({"objective": nothing} if "hooks" in k else {}))
        method.train(turn)
        assert len(calls) == 2
        for name, parameter in turn.split.personal.items():
            twin = name.removeprefix("personal.")
            assert torch.allclose(-parameter, turn.received[twin], atol=1e-6)
        assert any(not torch.equal(p, turn.received[n]) for n, p in turn.split.shared.items())


def test_v_trains_alone_and_lam_0_is_plain_training(take_turn: Any, merged: Callable[..., Any]) -> None:
    """The loss of v's first step is that of a model with v only."""
    losses: list[float] = []
    rows: list[Any] = []
    with take_turn("method.name=ditto", "method.options={lam=0}", on_step=lambda loss, _: losses.append(loss)) as (
        method,
        turn,
    ):
        method.receive(turn)
        v = {n: p.detach().clone() for n, p in turn.split.personal.items()}
        objective = turn.objective
        method.train(replace(turn, objective=lambda m, r, s: rows.append(r) or objective(m, r, s)))
        with torch.no_grad():
            alone = sum(part.item() for part in objective(merged((1.0, v)), rows[2], turn.settings))
        assert len(losses) == 4
        assert losses[2] == pytest.approx(alone, abs=1e-5)


def test_a_first_v_computes_what_the_received_w_does(take_turn: Any) -> None:
    """Kept with both signs turned, so that its bytes are not those that are sent."""
    with take_turn("method.name=ditto") as (method, turn):
        with torch.no_grad():
            for name, parameter in turn.split.personal.items():
                if ".lora_B." in name:
                    parameter.zero_()
        method.receive(turn)
        with method.in_state(turn, "global"):
            common = logits(turn.model)
        with method.in_state(turn, "personalized"):
            assert torch.allclose(logits(turn.model), common, atol=1e-6)
        for name, parameter in turn.split.personal.items():
            assert not torch.equal(parameter, turn.received[name.removeprefix("personal.")])


def test_states_are_w_alone_and_v_alone(take_turn: Any, merged: Callable[..., Any]) -> None:
    with take_turn("method.name=ditto") as (method, turn):
        expected = {
            "zero_shot": merged(),
            "global": merged((1.0, turn.split.shared)),
            "personalized": merged((1.0, turn.split.personal)),
        }
        for state, model in expected.items():
            with method.in_state(turn, state):
                assert torch.allclose(logits(turn.model), logits(model), atol=1e-5), state


def test_w_is_fedavg_bit_for_bit_and_v_another_model(recipe: Any, tmp_path: Path) -> None:
    settings = ("training.lr=0.02", "lora.dropout=0.1", "evaluation.max_new_tokens=2")
    summary = run_federation(recipe("method.name=ditto", *settings), tmp_path / "ditto")
    run_federation(recipe("method.name=fedavg", *settings), tmp_path / "fedavg")
    first, second = (
        (tmp_path / m / "shared" / "adapter_model.safetensors").read_bytes() for m in ("ditto", "fedavg")
    )
    assert first == second
    assert summary["mean"]["nll"]["personalized"] != summary["mean"]["nll"]["global"]


def test_one_local_step_leaves_no_personal_byte_in_a_message(recipe: Any, tmp_path: Path) -> None:
    """After one step no A has moved: v's A would be the very bytes that are sent."""
    config = recipe("method.name=ditto", "training.local_steps=1", "evaluation.max_new_tokens=1")
    assert run_federation(config, tmp_path / "run")["bytes"]["personal_sent"] == 0
