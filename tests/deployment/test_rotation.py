"""Keys change as docs/operating.md says: the server's CA under silos that keep running, then a SuperNode's key."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cluster import BIN, Cluster, shell, wait_until
from .conftest import SILOS

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]


def told(cluster: Cluster, *words: str) -> dict[str, Any]:
    """Return the JSON value that a command of Flower prints after its notices."""
    said = cluster.flwr(*words, "here", "--format", "json").stdout
    return dict(json.loads(said[said.index(b"{") :]))


def nodes(cluster: Cluster) -> dict[int, str]:
    """Return the nodes that the SuperLink knows, with their states."""
    return {int(one["node-id"]): one["status"] for one in told(cluster, "supernode", "list")["nodes"]}


def test_another_ca_and_another_supernode_key(
    tmp_path: Path, tiny_base: Path, rows: dict[str, Path], deployed: Callable[..., Path]
) -> None:
    recipe, folder = deployed(3), tmp_path / "cluster"
    folder.mkdir()
    with Cluster(folder, rows, tiny_base) as cluster:
        ours = {name: (folder / name).read_bytes() for name in ("ca.crt", "server.crt")}
        (folder / "later").mkdir()
        for name in ("ca.crt", "ca.key", "server.crt", "server.key"):
            shutil.move(folder / name, folder / "later" / name)
        cluster._certificates()  # the CA of today; what was made first is the one to come
        today = (folder / "ca.crt").read_bytes()
        assert today != ours["ca.crt"]
        (folder / "ca.crt").write_bytes(today + ours["ca.crt"])
        cluster.start_everything()
        before = nodes(cluster)

        cluster.stop("superlink")
        for name in ("server.crt", "server.key"):
            shutil.copy(folder / "later" / name, folder / name)
        cluster.start_superlink()
        cluster.submit(recipe, "kept")
        wait_until(lambda: len(cluster.rounds("kept")) >= 1, "a round under the other CA")
        assert sorted(cluster.rounds("kept")[0]["clients"]) == sorted(SILOS)
        assert nodes(cluster).keys() == before.keys()

        (run,) = told(cluster, "list")["runs"]
        cluster.flwr("stop", str(run["run-id"]), "here")
        status = [BIN / "flexperts", "status", str(cluster.runs / "kept"), "--json"]
        wait_until(lambda: json.loads(subprocess.check_output(status))["state"] == "stopped", "the run's end")
        done = len(cluster.rounds("kept"))
        assert done < 3

        cluster.stop("node-law_firm")
        shell(folder / "law_firm", 'rm key key.pub && ssh-keygen -q -t ecdsa -b 384 -N "" -f key')
        cluster.flwr("supernode", "register", str(folder / "law_firm" / "key.pub"), "here")
        wait_until(lambda: "offline" in nodes(cluster).values(), "the old node's end")
        (old,) = (number for number, state in nodes(cluster).items() if state == "offline")
        cluster.flwr("supernode", "unregister", str(old), "here")
        cluster.start_node("law_firm")
        subprocess.run([BIN / "flexperts", "forget", cluster.runs / "kept", "law_firm", "--key"], check=True)
        assert cluster.submit(recipe, "kept", "--resume").wait(300) == 0
        rounds = cluster.rounds("kept")
        assert [one["number"] for one in rounds] == [1, 2, 3]
        assert all(sorted(one["clients"]) == sorted(SILOS) for one in rounds[done:])
    assert not cluster.left
