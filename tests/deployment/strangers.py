"""SuperNodes in the sandboxes that flexperts ships, and an operator's app that looks for everything there."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from flexperts.config.data import DataConfig
from flexperts.deployment.units import write_units
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe, load_silo
from flexperts.server.checkpoint import load_server

from .cluster import PATIENCE, Cluster, wait_until

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


def attack(
    cluster: Cluster, told: dict[str, Any], out: Path | None = None, there: str | None = None
) -> list[dict[str, str]]:
    """Submit the attacking app and return what it got at each SuperNode, without the worker's answer.

    Args:
        cluster: The cluster.
        told: See ``probe``.
        out: A file that the ServerApp can write.
        there: The same file's path where the ServerApp runs.
    """
    app, out = cluster.folder / "attacking", out or cluster.folder / "found.json"
    shutil.copytree(APP, app)
    shutil.copy(PROBE, app / "attacking_app" / "probe.py")
    config = cluster.folder / "told.toml"
    config.write_text(tomli_w.dumps({"told": json.dumps(told), "out": there or str(out)}))
    cluster.flwr("run", str(app), "here", "--run-config", str(config))
    wait_until(out.exists, "the attacking app's end", PATIENCE)
    found = [json.loads(text) for text in json.loads(out.read_text())]
    for got in found:
        assert "FederationError" in got.pop("worker")  # a question that is none gets the type of an error
    return found


def assert_runs_as_ever(cluster: Cluster, recipe: Path, rows: dict[str, Path]) -> None:
    """Submit an ordinary run, and compare its bits with those of a run in this process."""
    assert cluster.submit(recipe, "after").wait(300) == 0
    clients = {n: {"train": str(p / "train.jsonl"), "test": str(p / "test.jsonl")} for n, p in rows.items()}
    data = DataConfig.model_validate({"clients": clients})
    alone = cluster.folder / "alone"
    run_federation(load_recipe(recipe).model_copy(update={"data": data}), alone)
    theirs, ours = (load_server(f / "checkpoint.safetensors") for f in (cluster.runs / "after", alone))
    assert theirs.shared.vector.tobytes() == ours.shared.vector.tobytes()
