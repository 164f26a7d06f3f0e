"""An operator submits an app of its own: in the sandbox it finds nothing, and the next run is as ever."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from flexperts.config.data import DataConfig
from flexperts.deployment.units import write_units
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe, load_silo
from flexperts.server.checkpoint import load_server

from .cluster import PATIENCE, Cluster, free_port, wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.attacks, pytest.mark.timeout(900)]

SILOS = ("clinic", "law_firm")
APP = Path(__file__).parent / "attacking"
PROBE = Path(__file__).parents[1] / "attacks" / "probe.py"


class Strangers(Cluster):
    """A cluster whose SuperNodes and apps run in the sandboxes that flexperts ships."""

    def start_worker(self, silo: str) -> None:
        self._start(f"worker-{silo}", "flexperts", "silo", "serve", f"{silo}/silo.toml")
        wait_until(lambda: (self.folder / silo / "ask" / "worker.sock").exists(), f"the worker of {silo}")

    def start_node(self, silo: str) -> None:
        file, units = self.folder / silo / "silo.toml", self.folder / silo / "units"
        write_units(file, load_silo(file), f"localhost:{self.port}", units)
        node = self._start(f"node-{silo}", str(units / "isolated-supernode"), "ca.crt", f"{silo}/key")
        with pytest.raises(subprocess.TimeoutExpired):
            node.wait(8.0)

    def _silo(self, name: str, rows: Path, base: Path) -> None:
        super()._silo(name, rows, base)
        user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
        with (self.folder / name / "silo.toml").open("a", encoding="utf-8") as file:
            file.write(f'[socket]\npath = "ask/worker.sock"\ngroup = "{group}"\nusers = ["{user}"]\n')


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
        app, out = tmp_path / "attacking", tmp_path / "found.json"
        shutil.copytree(APP, app)
        shutil.copy(PROBE, app / "attacking_app" / "probe.py")
        (tmp_path / "told.toml").write_text(tomli_w.dumps({"told": json.dumps(told), "out": str(out)}))
        cluster.flwr("run", str(app), "here", "--run-config", str(tmp_path / "told.toml"))
        wait_until(out.exists, "the attacking app's end", PATIENCE)
        found = json.loads(out.read_text())
        assert len(found) == len(SILOS)
        for text in found:
            got = json.loads(text)
            assert "FederationError" in got.pop("worker")  # a question that is none gets the type of an error
            assert got == {}
        secret.unlink()

        assert cluster.submit(recipe, "after").wait(300) == 0
        clients = {n: {"train": str(p / "train.jsonl"), "test": str(p / "test.jsonl")} for n, p in rows.items()}
        data = DataConfig.model_validate({"clients": clients})
        run_federation(load_recipe(recipe).model_copy(update={"data": data}), tmp_path / "alone")
        theirs, ours = (
            load_server(f / "checkpoint.safetensors") for f in (cluster.runs / "after", tmp_path / "alone")
        )
        assert theirs.shared.vector.tobytes() == ours.shared.vector.tobytes()
    assert not cluster.left
