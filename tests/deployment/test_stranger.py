"""An operator submits an app of its own: in the sandbox it finds nothing, and the next run is as ever."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from .cluster import free_port
from .conftest import SILOS
from .strangers import Strangers, assert_runs_as_ever, attack

pytestmark = [pytest.mark.deployment, pytest.mark.attacks, pytest.mark.timeout(900)]


@pytest.mark.usefixtures("sandbox")
def test_an_app_finds_nothing(
    tmp_path: Path, tiny_base: Path, rows: dict[str, Path], deployed: Callable[..., Path]
) -> None:
    recipe, folder = deployed(1), tmp_path / "cluster"
    folder.mkdir()
    lure = socket.create_server(("0.0.0.0", free_port()))
    with lure, Strangers(folder, rows, tiny_base) as cluster:
        cluster.start_superlink()
        cluster.register()
        for silo in SILOS:
            cluster.start_silo(silo)
        secret = folder / "clinic" / "state" / "runs" / "personal.safetensors"
        secret.parent.mkdir()
        secret.write_text("xylophone")
        own = [p for silo in SILOS for p in (folder / silo).rglob("*") if p.is_file()]
        told = {
            "nodes": len(SILOS),
            "files": [str(p) for p in [*own, *(p / "train.jsonl" for p in rows.values()), folder / "ca.key"]],
            "folders": [str(folder / "clinic" / "state"), *map(str, rows.values())],
            "needles": ["PRIVATE KEY", "xylophone"],
            "writes": ["/x", "/usr/x", "/var/tmp/x", str(folder / "clinic" / "ask" / "x")],
            "addresses": [("127.0.0.1", lure.getsockname()[1]), ("127.0.0.1", cluster.port), ("127.0.0.1", 9092)],
            "socket": str(folder / "clinic" / "ask" / "worker.sock"),
            "abstract": "none",
            "processes": [cluster.processes["worker-clinic"].pid, cluster.processes["superlink"].pid],
        }
        assert attack(cluster, told) == [{}] * len(SILOS)
        secret.unlink()
        assert_runs_as_ever(cluster, recipe, rows)
    assert not cluster.left
