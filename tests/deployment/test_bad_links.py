"""Runs over bad links lose nothing and count nothing twice: `pytest -m deployment`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.data import DataConfig
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe
from flexperts.server.checkpoint import load_server

from .bad_link import BadLink
from .cluster import Cluster, wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

Rows = dict[str, Path]
Deployed = Callable[..., Path]
LINKS: dict[str, dict[str, Any]] = {
    "500 ms there and back, 10 Mbit/s, closed when idle": {"delay": 0.25, "rate": 1.25e6, "idle": 5.0},
    "every connection cut in a message": {"cuts": 1.0},
    "1 % of the TCP segments are lost": {"loss": 0.01},
    "IPv6": {"family": socket.AF_INET6},
}
ROUNDS = 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bits of the same run in one process, made once."""
    return {}


def whole(recipe: Path, rows: Rows, folder: Path, alone: dict[str, bytes]) -> bytes:
    if not alone:
        clients = {n: {"train": str(p / "train.jsonl"), "test": str(p / "test.jsonl")} for n, p in rows.items()}
        data = DataConfig.model_validate({"clients": clients})
        run_federation(load_recipe(recipe).model_copy(update={"data": data}), folder)
        alone["shared"] = load_server(folder / "checkpoint.safetensors").shared.vector.tobytes()
    return alone["shared"]


def check_once(cluster: Cluster, out: str) -> None:
    """Every silo has trained every round once, and every update has counted."""
    logs = cluster.rounds(out)
    assert [sorted(log["clients"]) for log in logs] == [sorted(cluster.silos)] * ROUNDS
    assert not any(log["missing"] or log["refused"] for log in logs)
    for silo in cluster.silos:
        told = cluster.log(f"worker-{silo}")
        assert [told.count(f"round {number}: trained") for number in (1, 2)] == [1, 1]


@pytest.mark.parametrize("name", LINKS)
def test_a_run_over_a_bad_link_is_the_same_run(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed, alone: dict[str, bytes], name: str
) -> None:
    recipe = deployed(ROUNDS, deadline=300)
    (tmp_path / "cluster").mkdir()
    with (
        Cluster(tmp_path / "cluster", rows, tiny_base, tls=False) as cluster,
        closing(BadLink(cluster.port, **LINKS[name])) as link,
    ):
        cluster.through, cluster.host = link.port, "[::1]" if "family" in LINKS[name] else "127.0.0.1"
        cluster.start_everything()
        assert cluster.submit(recipe, "bad").wait(600) == 0
        check_once(cluster, "bad")
        found = load_server(cluster.runs / "bad" / "checkpoint.safetensors").shared.vector.tobytes()
        assert found == whole(recipe, rows, tmp_path / "alone", alone)
        assert link.cut >= (5 if "cuts" in LINKS[name] else 0)
        assert link.dropped >= (5 if "loss" in LINKS[name] else 0)
    assert not cluster.left


def test_a_link_that_is_gone_while_silos_train_loses_nothing(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed, alone: dict[str, bytes]
) -> None:
    """Their updates are finished while nobody can be reached, and arrive when the link is back."""
    recipe = deployed(ROUNDS, deadline=400)
    (tmp_path / "cluster").mkdir()
    with (
        Cluster(tmp_path / "cluster", rows, tiny_base, tls=False) as cluster,
        closing(BadLink(cluster.port)) as link,
    ):
        cluster.through = link.port
        cluster.start_everything()
        run = cluster.submit(recipe, "gone")
        wait_until(lambda: "joined" in cluster.log("worker-clinic"), "the silos", 300)
        wait_until(lambda: "sent the initial shared weights" in cluster.log("worker-clinic"), "the start", 300)
        link.go(40.0)
        assert run.wait(600) == 0
        assert link.refused
        check_once(cluster, "gone")
        found = load_server(cluster.runs / "gone" / "checkpoint.safetensors").shared.vector.tobytes()
        assert found == whole(recipe, rows, tmp_path / "alone", alone)
    assert not cluster.left
