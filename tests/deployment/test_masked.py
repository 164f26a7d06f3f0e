"""Secure aggregation between real SuperLinks, SuperNodes and workers on loopback: `pytest -m deployment`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.client.client import Client
from flexperts.communication.secure.fixed_point import FixedPoint
from flexperts.config.data import DataConfig
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe
from flexperts.server.checkpoint import load_server

from .cluster import Cluster, wait_until
from .proxy import RecordingProxy

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

SILOS = ("clinic", "help_desk", "law_firm", "shop")
CLIP = 100.0


@pytest.fixture(scope="module")
def four(silos: Path) -> dict[str, Path]:
    """Silo -> folder with its train and test rows."""
    return {name: silos / name for name in SILOS}


def masked(deployed: Callable[..., Path], rounds: int, **given: Any) -> Path:
    recipe = deployed(rounds, method="fedavg", **given)
    text = recipe.read_text().replace("min_clients = 2", 'min_clients = 4\nmax_norm_ratio = "off"')
    recipe.write_text(f'{text}\n[privacy]\naggregation = "secure"\nclip = {CLIP}\n')
    return recipe


def test_a_recording_proxy_finds_no_update(
    tmp_path: Path, tiny_base: Path, four: dict[str, Path], deployed: Callable[..., Path], monkeypatch: Any
) -> None:
    """A run in one process has the same updates, so it is known what they would look like."""
    recipe = masked(deployed, 1)
    updates: list[Any] = []
    train = Client.train

    def noted(client: Client, request: Any) -> Any:
        trained = train(client, request)
        updates.append((trained.sent.payload.vector.copy(), trained.sent.change.copy()))
        return trained

    monkeypatch.setattr(Client, "train", noted)
    clients = {n: {"train": str(p / "train.jsonl"), "test": str(p / "test.jsonl")} for n, p in four.items()}
    data = DataConfig.model_validate({"clients": clients})
    run_federation(load_recipe(recipe).model_copy(update={"data": data}), tmp_path / "alone")
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", four, tiny_base, tls=False) as cluster:
        proxy = RecordingProxy(cluster.port)
        cluster.through = proxy.port
        cluster.start_everything()
        assert cluster.submit(recipe, "seen").wait(300) == 0
        streams = proxy.streams()
        shared, alone = (
            load_server(folder / "checkpoint.safetensors").shared.vector
            for folder in (cluster.runs / "seen", tmp_path / "alone")
        )
        assert shared.tobytes() == alone.tobytes()  # so the updates were the same
        assert any(shared[:4096].tobytes() in stream for stream in streams)  # the proxy does see tensors
        assert len(updates) == len(SILOS)
        for sent, change in updates:
            for values in (sent, change, FixedPoint(CLIP, len(SILOS)).encode(change)):
                windows = [values[at : at + 64].tobytes() for at in range(0, values.size - 64, values.size // 20)]
                assert not [w for w in windows if w.strip(b"\0") and any(w in stream for stream in streams)]
        [log] = cluster.rounds("seen")
        assert log["secure"]["exchanges"] == 2
        proxy.close()
    assert not cluster.left


def test_a_silo_is_killed_while_it_trains_and_the_others_sum_is_made(
    tmp_path: Path, tiny_base: Path, four: dict[str, Path], deployed: Callable[..., Path]
) -> None:
    recipe = masked(deployed, 3, deadline=60)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", four, tiny_base) as cluster:
        cluster.start_everything()
        run = cluster.submit(recipe, "masks")
        wait_until(lambda: len(cluster.rounds("masks")) >= 1, "round 1")
        cluster.kill("worker-law_firm")
        wait_until(lambda: len(cluster.rounds("masks")) >= 2, "round 2 without it")
        cluster.start_worker("law_firm")
        assert run.wait(300) == 0
        rounds = cluster.rounds("masks")
        assert sorted(rounds[1]["clients"]) == sorted(set(SILOS) - {"law_firm"})
        assert np.isfinite([log["secure"]["norm"] for log in rounds]).all()
        assert [log["secure"]["exchanges"] for log in rounds][:2] == [2, 1]
        assert cluster.log("worker-clinic").count("is new, its identity is") == 3
        summary = json.loads((cluster.runs / "masks" / "summary.json").read_text())
        assert summary["bytes"]["keys_total"] > 0
    assert not cluster.left


def test_a_silo_is_killed_after_it_sent_keys_and_after_it_sent_its_update(
    tmp_path: Path, tiny_base: Path, four: dict[str, Path], deployed: Callable[..., Path]
) -> None:
    """The first time its masks are taken out of the sum, the second time its update is part of it."""
    recipe = masked(deployed, 5, deadline=60)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", four, tiny_base) as cluster:
        cluster.start_everything()

        def said(text: str) -> list[str]:
            return [line for line in cluster.log("worker-law_firm").splitlines() if text in line]

        run = cluster.submit(recipe, "phases")
        wait_until(lambda: said("sent keys and shares"), "the keys of round 1")
        cluster.kill("worker-law_firm")
        assert not said(": trained")
        wait_until(lambda: len(cluster.rounds("phases")) >= 1, "round 1 without it")
        cluster.start_worker("law_firm")
        wait_until(lambda: said(": trained"), "its first update")
        cluster.kill("worker-law_firm")
        [line] = said(": trained")
        number = int(line.partition(", round ")[2].partition(":")[0])
        assert len(cluster.rounds("phases")) == number - 1, "the sum was unmasked before the kill"
        wait_until(lambda: len(cluster.rounds("phases")) >= number, "the sum with its update")
        cluster.start_worker("law_firm")
        assert run.wait(300) == 0
        rounds = cluster.rounds("phases")
        assert "law_firm" not in rounds[0]["clients"]
        assert "law_firm" in rounds[number - 1]["clients"]
        assert np.isfinite([log["secure"]["norm"] for log in rounds]).all()
        assert not [log["secure"]["spoilt"] for log in rounds if "spoilt" in log["secure"]]
    assert not cluster.left
