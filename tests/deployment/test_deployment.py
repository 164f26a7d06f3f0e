"""Real SuperLinks, SuperNodes and workers on loopback: `pytest -m deployment`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flexperts.config.data import DataConfig
from flexperts.engines.run import run_federation
from flexperts.parameters.store import load_personal
from flexperts.recipe import load_recipe
from flexperts.server.checkpoint import load_server

from .cluster import Cluster, wait_until
from .proxy import RecordingProxy

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

Rows = dict[str, Path]
Deployed = Callable[..., Path]
SILOS = ("clinic", "law_firm")


def state(cluster: Cluster, silo: str) -> Path:
    (found,) = (cluster.folder / silo / "state" / "runs").glob(f"*/personal/{silo}.safetensors")
    return found


def tensors_of(path: Path) -> dict[str, bytes]:
    return {n: t.contiguous().numpy().tobytes() for n, t in load_file(path).items()}


def test_two_rounds_over_tls_are_those_of_one_process(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed
) -> None:
    recipe = deployed(2)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", rows, tiny_base) as cluster:
        cluster.start_everything()
        run = cluster.submit(recipe, "tls")
        assert run.wait(300) == 0
        assert len(cluster.rounds("tls")) == 2
        here = cluster.runs / "tls"
        assert not list(here.rglob("personal"))  # nothing of a silo's own lies at the server
        clients = {n: {"train": str(p / "train.jsonl"), "test": str(p / "test.jsonl")} for n, p in rows.items()}
        data = DataConfig.model_validate({"clients": clients})
        summary = run_federation(load_recipe(recipe).model_copy(update={"data": data}), tmp_path / "alone")
        theirs, ours = (load_server(f / "checkpoint.safetensors") for f in (here, tmp_path / "alone"))
        assert theirs.shared.vector.tobytes() == ours.shared.vector.tobytes()
        for silo in SILOS:
            personal = tensors_of(state(cluster, silo))
            assert personal == tensors_of(tmp_path / "alone" / "personal" / f"{silo}.safetensors")
            assert cluster.log(f"worker-{silo}").count("base loaded") == 1
        deployed_summary = json.loads((here / "summary.json").read_text())
        assert deployed_summary["mean"] == summary["mean"]
        assert deployed_summary["bytes"]["personal_sent"] == 0
    assert not cluster.left


def test_a_silo_and_then_the_superlink_are_killed_and_the_run_ends_well(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed
) -> None:
    recipe = deployed(4, deadline=60)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", rows, tiny_base) as cluster:
        cluster.start_everything()
        cluster.submit(recipe, "storm")
        wait_until(lambda: len(cluster.rounds("storm")) >= 1, "round 1")
        graft = load_personal(state(cluster, "law_firm"))[1].choice
        cluster.pause("worker-law_firm")
        wait_until(lambda: "round 2: trained" in cluster.log("worker-clinic"), "round 2 of the other silo")
        cluster.kill("worker-law_firm")  # in the middle of its round
        cluster.kill("node-law_firm")
        wait_until(lambda: len(cluster.rounds("storm")) >= 2, "round 2 without it")
        second = cluster.rounds("storm")[1]
        assert sorted(second["clients"]) == ["clinic"]
        assert "law_firm" in {*second["missing"], *second["refused"]}

        cluster.kill("superlink")  # with its ServerApp; the other silo stands
        cluster.start_superlink()
        cluster.start_silo("law_firm")
        again = cluster.submit(recipe, "storm", "--resume")
        assert again.wait(400) == 0
        rounds = cluster.rounds("storm")
        assert [r["number"] for r in rounds] == [1, 2, 3, 4]
        assert rounds[:2] == [*cluster.rounds("storm")[:1], second]
        assert sorted(rounds[3]["clients"]) == sorted(SILOS)
        meta = load_personal(state(cluster, "law_firm"))[1]
        assert (meta.round, meta.choice) == (4, graft)  # it kept its graft
        assert cluster.log("worker-clinic").count("base loaded") == 1
        summary = json.loads((cluster.runs / "storm" / "summary.json").read_text())
        assert sorted(summary["clients"]) == sorted(SILOS)
    assert not cluster.left


def test_nothing_personal_and_no_text_crosses_the_network(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed
) -> None:
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", rows, tiny_base, tls=False) as cluster:
        proxy = RecordingProxy(cluster.port)
        cluster.through = proxy.port
        cluster.start_everything()
        assert cluster.submit(deployed(2), "seen").wait(300) == 0
        streams = proxy.streams()
        shared = load_server(cluster.runs / "seen" / "checkpoint.safetensors").shared.vector
        assert any(shared[:4096].tobytes() in s for s in streams)  # the proxy does see tensors: what silos got
        for silo in SILOS:
            windows = [raw.lstrip(b"\0")[:512] for raw in tensors_of(state(cluster, silo)).values()]
            assert any(len(w) == 512 for w in windows)
            seen = [w for w in windows if len(w) >= 16 and any(w in s for s in streams)]
            assert not seen
            for text in texts(rows[silo]):
                assert not any(text in s for s in streams)
        proxy.close()
    assert not cluster.left


def texts(folder: Path) -> list[bytes]:
    """Return pieces of every row's fields, as they would stand in a message."""
    found: list[bytes] = []
    for path in (folder / "train.jsonl", folder / "test.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = [str(v) for k, v in json.loads(line).items() if k in ("instruction", "context", "response")]
            found += [f[:60].encode() for f in fields if len(f) >= 20]
    assert len(found) > 20
    return found
