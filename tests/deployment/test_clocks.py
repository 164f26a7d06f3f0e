"""A silo whose clock is off: what Flower takes, and what the operator reads; `pytest -m deployment`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from .cluster import Cluster, wait_until

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
pytestmark = [
    pytest.mark.deployment,
    pytest.mark.timeout(600),
    pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed"),
]


@pytest.mark.parametrize(("shift", "taken"), [("-120s", True), ("+60s", False), ("-600s", False)])
def test_a_silo_whose_clock_is_off(
    tmp_path: Path, tiny_base: Path, rows: dict[str, Path], shift: str, taken: bool
) -> None:
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", {"clinic": rows["clinic"]}, tiny_base) as cluster:
        cluster.start_superlink()
        cluster.register()
        true = dict(cluster.environment)
        cluster.environment |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        with suppress(TimeoutError):
            cluster.start_node("clinic")
        cluster.environment = true
        wait_until(
            lambda: online(cluster) or "Traceback" in cluster.log("node-clinic"), "an answer to the SuperNode"
        )
        print(cluster.log("node-clinic")[-2000:])
        assert online(cluster) == taken


def online(cluster: Cluster) -> bool:
    return b"online" in cluster.flwr("supernode", "list", "here", "--format", "json").stdout
