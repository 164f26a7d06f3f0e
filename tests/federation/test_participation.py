"""Sampled clients: who is drawn, who trains, who is evaluated, and what the average weighs."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.methods.fedavg import FedAvg
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.store import load_personal
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import load_server
from flexperts.server.strategy import FlexpertsStrategy

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
CLIENTS = ["clinic", "help_desk", "law_firm", "shop"]
SHORT = ("evaluation.max_new_tokens=1", "evaluation.rows=1")


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def drawn(
    config: RunConfig, count: int, clients: list[str] = CLIENTS, method: Method | None = None
) -> list[list[str]]:
    """Return who would train in the first rounds, without training."""
    nodes = dict(enumerate(clients, 1))
    state = Server(Payload.empty(), dict.fromkeys(clients, 1), seed=config.seed)
    strategy: Any = FlexpertsStrategy(method or FedAvg(), config, nodes, state, None, None)  # type: ignore[arg-type]
    found = []
    for number in range(count):
        state.round = number
        found.append(strategy._participants(number + 1))
    return found


def test_everyone_takes_part_by_default(recipe: Recipe) -> None:
    assert drawn(recipe(), 5) == [CLIENTS] * 5


@pytest.mark.parametrize(
    ("share", "count"), [(0.5, 2), (0.75, 3), (0.25, 1), (0.01, 1), (0.6, 2), (0.7, 3), (0.99, 4), (1.0, 4)]
)
def test_the_share_is_rounded_and_never_nobody(recipe: Recipe, share: float, count: int) -> None:
    for names in drawn(recipe(f"federation.participation={share}"), 20):
        assert len(names) == len(set(names)) == count
        assert names == sorted(names)
        assert set(names) <= set(CLIENTS)


def test_draws_are_a_function_of_seed_and_round(recipe: Recipe) -> None:
    half = "federation.participation=0.5"
    first = drawn(recipe(half), 12)
    assert drawn(recipe(half), 12) == first
    assert drawn(recipe(half, "training.lr=0.5", "method.name=local"), 12) == first
    assert drawn(recipe(half), 12, CLIENTS[::-1]) == first  # nodes join in any order
    assert len({tuple(names) for names in first}) > 2
    assert len({json.dumps(drawn(recipe(half, f"seed={seed}"), 12)) for seed in range(8)}) == 8


def test_all_pairs_are_drawn_about_equally_often(recipe: Recipe) -> None:
    """600 draws of 6 pairs: 100 each, standard deviation 9."""
    found = [tuple(names) for names in drawn(recipe("federation.participation=0.5"), 600)]
    counts = {pair: found.count(pair) for pair in combinations(CLIENTS, 2)}
    assert sum(counts.values()) == 600
    assert all(60 < count < 140 for count in counts.values()), counts


def test_a_method_can_choose_others(recipe: Recipe) -> None:
    class Everyone(FedAvg):
        def participants(self, server: Server, sampled: Any) -> list[str]:
            assert len(sampled) == 2
            return sorted(server.clients, reverse=True)

    assert drawn(recipe("federation.participation=0.5"), 3, method=Everyone()) == [CLIENTS] * 3


@pytest.fixture
def half(recipe: Recipe, tmp_path: Path) -> tuple[RunConfig, Path]:
    config = recipe("federation.participation=0.5", "federation.rounds=3", "evaluation.every=1", *SHORT)
    run_federation(config, tmp_path / "run")
    return config, tmp_path / "run"


def test_only_the_drawn_train_and_all_are_evaluated(half: tuple[RunConfig, Path]) -> None:
    config, out = half
    expected = drawn(config, 3)
    records = rounds(out)
    for record, names in zip(records, expected, strict=True):
        for key in ("clients", "uplink", "downlink"):
            assert list(record[key]) == names
        assert sorted(record["scores"]) == CLIENTS
    summary = json.loads((out / "summary.json").read_text())
    assert sorted(summary["clients"]) == CLIENTS
    assert all(c["nll"]["personalized"] is not None for c in summary["clients"].values())
    for direction in ("uplink", "downlink"):
        sizes = [size for record in records for size in record[direction].values()]
        assert len(sizes) == 6
        assert summary["bytes"][f"{direction}_total"] == sum(sizes)
        assert summary["bytes"][f"{direction}_per_client_per_round"] == sum(sizes) / 6
    trained_in = {c: [0, *(r for r, names in enumerate(expected, 1) if c in names)] for c in CLIENTS}
    assert len({tuple(r) for r in trained_in.values()}) > 1  # else the draws prove nothing
    for client, numbers in trained_in.items():
        path = out / "personal" / f"{client}.safetensors"
        assert load_personal(path)[1].round == numbers[-1]
        if numbers[1:]:
            assert load_personal(path.parent / "before" / path.name)[1].round == numbers[-2]
    assert TrainedRun(out).clients == CLIENTS


@pytest.fixture
def unequal(tmp_path: Path) -> str:
    """Three clients of 4, 8 and 24 rows, as the recipe's data section."""
    for name, count in (("a", 4), ("b", 8), ("c", 24)):
        for split, rows in (("train", count), ("test", 2)):
            lines = [{"instruction": f"{name} {split} {i}", "response": f"{name}{i}"} for i in range(rows)]
            (tmp_path / f"{name}.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clients = (f"{n}={{train='{tmp_path}/{n}.train.jsonl', test='{tmp_path}/{n}.test.jsonl'}}" for n in "abc")
    return "data={clients={" + ", ".join(clients) + "}}"


@pytest.mark.parametrize("participation", [1.0, 0.67])
def test_the_average_is_weighted_by_rows(
    recipe: Recipe, tmp_path: Path, unequal: str, participation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """theta = sum_i n_i theta_i / sum_i n_i over those who trained."""
    seen: list[Update] = []
    aggregate = Method.aggregate

    def watch(self: Method, server: Server, updates: Any) -> None:
        arrived = list(updates)
        seen.extend(arrived)
        aggregate(self, server, iter(arrived))

    monkeypatch.setattr(Method, "aggregate", watch)
    config = recipe(
        unequal, f"federation.participation={participation}", "federation.rounds=1", "training.lr=0.05", *SHORT
    )
    run_federation(config, tmp_path / "run")
    sizes = {"a": 4, "b": 8, "c": 24}
    assert [u.client for u in seen] == drawn(config, 1, ["a", "b", "c"])[0]
    assert len(seen) == (3 if participation == 1 else 2)
    assert [u.rows for u in seen] == [sizes[u.client] for u in seen]
    vectors = np.array([u.vector for u in seen], dtype=np.float64)
    weights = np.array([sizes[u.client] for u in seen], dtype=np.float64)
    expected = (vectors * weights[:, None]).sum(0) / weights.sum()
    server = load_server(tmp_path / "run" / "checkpoint.safetensors")
    assert server.clients == sizes
    np.testing.assert_allclose(server.shared.vector, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(server.shared.vector - vectors.mean(0)).max() > 1e-3  # the plain mean is another one
    assert [c["rows"] for c in rounds(tmp_path / "run")[0]["clients"].values()] == weights.tolist()
