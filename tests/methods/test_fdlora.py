"""FDLoRA: the outer step by hand, when a client's own copy is taken, and the search for the fusion weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.engines.run import run_federation
from flexperts.methods.fdlora import FDLoRA, fused, search
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload

NAME = "base_model.x"


def update(client: str, values: list[float], rows: int) -> Update:
    return Update(client, Payload.of({NAME: torch.tensor(values)}), rows, {})


def test_the_outer_step_is_nesterov_by_hand() -> None:
    """Stage 1 is the mean by rows; then d = theta - mean, v <- 0.5 v + d, theta <- theta - (d + 0.5 v)."""
    method = FDLoRA()
    server = Server(Payload.of({NAME: torch.tensor([9.0, 9.0])}), {"a": 1, "b": 3})
    rounds = [
        ([0.0, 4.0], [4.0, 0.0]),
        ([3.0, 1.0], [1.0, 1.0]),
        ([0.0, 2.0], [2.0, 2.0]),
        ([1.0, 0.0], [1.0, 4.0]),
    ]
    seen = []
    for ours, theirs in rounds:
        method.aggregate(server, iter([update("a", ours, 1), update("b", theirs, 3)]))
        server.round += 1
        seen.append(server.shared.vector.tolist())
    # means by hand: (3, 1), (1.5, 1), (1.5, 2), (1, 3)
    theta = np.array([3.0, 1.0])
    expected, velocity = [theta], np.zeros(2)
    for mean in ([1.5, 1.0], [1.5, 2.0], [1.0, 3.0]):
        d = theta - np.array(mean)
        velocity = 0.5 * velocity + d
        theta = theta - (d + 0.5 * velocity)
        expected.append(theta)
    assert expected[1].tolist() == [0.75, 1.0]  # 3 - 1.5 x 1.5
    assert np.allclose(seen, expected, atol=1e-6)


def test_the_outer_step_is_that_of_torch() -> None:
    method = FDLoRA(FDLoRA.Options(server_lr=0.7, momentum=0.9))
    stream = torch.Generator().manual_seed(0)
    start, *means = torch.randn(5, 6, generator=stream)
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True)
    server = Server(Payload.of({NAME: start}), {"a": 2}, round=1)
    for mean in means:
        theta.grad = theta.detach() - mean
        optimizer.step()
        method.aggregate(server, iter([update("a", mean.tolist(), 2)]))
        assert np.allclose(server.shared.vector, theta.detach().numpy(), atol=1e-6)
    assert set(server.memory) == {"momentum"}


def test_a_copy_is_kept_in_stage_1_and_every_hth_round_after_it(take_turn: Any) -> None:
    kept = []
    with take_turn("method.name=fdlora", "method.options={sync_every=3}") as (method, turn):
        for number in range(1, 9):
            turn = replace(turn, round=number)
            method.train(turn)
            copy = {n.removeprefix("own."): t for n, t in turn.memory.items()}
            if all(torch.equal(p, copy[n]) for n, p in turn.split.shared.items()):
                kept.append(number)
    assert kept == [1, 4, 7]


def test_all_clients_take_part_in_stage_1() -> None:
    server = Server(Payload.empty(), {"a": 1, "b": 1, "c": 1})
    assert FDLoRA().participants(server, ["b"]) == ["a", "b", "c"]
    server.round = 1
    assert FDLoRA().participants(server, ["b"]) == ["b"]


@pytest.mark.parametrize("best", [(0.7, 0.4), (-0.6, 1.1), (0.0, 0.0)])
def test_the_search_finds_a_known_optimum(best: tuple[float, float]) -> None:
    found = search(lambda a, b: (a - best[0]) ** 2 + 2 * (b - best[1]) ** 2, 200, 0.0)
    assert found == pytest.approx(best, abs=1e-3)


def test_the_search_stays_in_bounds_and_budget_and_repeats_itself() -> None:
    points: list[tuple[float, float]] = []
    loss = lambda a, b: points.append((a, b)) or -a - b  # noqa: E731
    assert search(loss, 200, 0.0) == pytest.approx((1.5, 1.5), abs=1e-3)
    assert np.abs(points).max() <= 1.5
    points.clear()
    first = search(loss, 20, 0.0)
    assert 3 < len(points) <= 20
    assert search(loss, 20, 0.0) == first


def test_the_penalty_is_005_of_the_mean_weight() -> None:
    """min (a-1)^2 + (b-1)^2 + p (|a|+|b|)/2 is at 1 - p/4."""
    found = search(lambda a, b: (a - 1) ** 2 + (b - 1) ** 2, 300, 0.4)
    assert found == pytest.approx((0.9, 0.9), abs=1e-3)
    assert FDLoRA.Options().fusion_penalty == 0.05


def test_few_evaluations_are_never_worse_than_either_model_alone() -> None:
    loss = lambda a, b: abs(a - 1) + abs(b)  # noqa: E731
    assert search(loss, 3, 0.0) == (1.0, 0.0)


def test_fusion_is_elementwise() -> None:
    common, own = {"A": torch.tensor([1.0, 2.0])}, {"A": torch.tensor([10.0, -4.0])}
    assert fused(common, own, 0.5, -0.25)["A"].tolist() == [-2.0, 2.0]


def test_the_personalized_state_is_the_fused_model(take_turn: Any, merged: Callable[..., Any]) -> None:
    """The weights are those that a fresh search on the same rows finds; theta_s is back afterwards."""
    ids = torch.arange(24).reshape(2, 12)
    with take_turn("method.name=fdlora", "method.options={fusion_rows=5, fusion_budget=9}") as (method, turn):
        common = {n: p.detach().clone() for n, p in turn.split.shared.items()}
        own = {n: torch.roll(t, 1, 0) for n, t in common.items()}
        turn.memory |= {f"own.{n}": t for n, t in own.items()}
        order = torch.randperm(len(turn.site.examples), generator=turn.site.generator("fusion"))
        rows = [turn.site.examples[i] for i in order[:5]]

        def loss(w1: float, w2: float) -> float:
            model = merged((1.0, fused(common, own, w1, w2)))
            with torch.no_grad():
                return sum(part.item() for part in turn.objective(model, rows, turn.settings))

        w1, w2 = search(loss, 9, 0.05)
        expected = merged((1.0, {n: w1 * t + w2 * own[n] for n, t in common.items()}))
        for _ in range(2):
            with method.in_state(turn, "personalized"), torch.no_grad():
                assert torch.allclose(turn.model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-3)
                assert any(not torch.equal(p, common[n]) for n, p in turn.split.shared.items())
            assert all(torch.equal(p, common[n]) for n, p in turn.split.shared.items())


def tensors(path: Path) -> dict[str, Tensor]:
    return {n.removeprefix("memory.own."): t for n, t in load_file(path).items()}


def test_a_run_keeps_own_copies_and_fuses_them(recipe: Any, tmp_path: Path) -> None:
    settings = ("training.lr=0.02", "evaluation.max_new_tokens=2", "federation.rounds=2")
    summary = run_federation(
        recipe("method.name=fdlora", "method.options={fusion_budget=6}", *settings), tmp_path / "run"
    )
    first, second = (tensors(tmp_path / "run" / "personal" / f"{c}.safetensors") for c in ("shop", "clinic"))
    assert first.keys() == load_file(tmp_path / "run" / "shared" / "adapter_model.safetensors").keys()
    assert any(not torch.equal(t, second[n]) for n, t in first.items())
    assert summary["mean"]["nll"]["personalized"] != summary["mean"]["nll"]["global"]


def test_a_client_that_was_away_in_round_1_fuses_theta_s_with_itself(
    take_turn: Any, merged: Callable[..., Any]
) -> None:
    ids = torch.arange(24).reshape(2, 12)
    with take_turn("method.name=fdlora", round=2) as (method, turn):
        common = {n: p.detach().clone() for n, p in turn.split.shared.items()}
        w1, w2 = method.settle(turn)["fusion"].tolist()
        scaled = merged((1.0, {n: (w1 + w2) * t for n, t in common.items()}))
        with method.in_state(turn, "personalized"), torch.no_grad():
            assert torch.allclose(turn.model(input_ids=ids).logits, scaled(input_ids=ids).logits, atol=1e-3)
