"""Two regions and their root: three SuperLinks on loopback, `pytest -m deployment`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from flexperts.config.data import DataConfig
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe
from flexperts.server.checkpoint import load_server

from .cluster import Cluster, wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

REGIONS = {"north": ("clinic", "help_desk"), "south": ("law_firm", "shop")}


def test_two_regions_are_one_federation(
    tmp_path: Path, silos: Path, tiny_base: Path, deployed: Callable[..., Path]
) -> None:
    """The same as one tier within rounding, down to the silos' scores."""
    recipe = deployed(3, method="fedavg", deadline=400)
    with ExitStack() as stack:

        def cluster(name: str, members: tuple[str, ...]) -> Cluster:
            (tmp_path / name).mkdir()
            rows = {silo: silos / silo for silo in members}
            return stack.enter_context(Cluster(tmp_path / name, rows, tiny_base, tls=False))

        regions = {name: cluster(name, members) for name, members in REGIONS.items()}
        for name, region in regions.items():
            region.start_everything()
            region.submit(recipe, "inside", "--region", name, "--set", "federation.deadline=200")
        root = cluster("root", ())
        root.start_superlink()
        for name, region in regions.items():
            door = region.runs / "inside" / "region" / "worker.sock"
            wait_until(door.exists, f"the door of {name}", 300)
            root.start_node(name, f'name="{name}" socket="{door}"')
        run = root.submit(recipe, "whole")
        assert run.wait(500) == 0, root.log("run-whole-3")

        clients = {
            silo: {"train": str(silos / silo / "train.jsonl"), "test": str(silos / silo / "test.jsonl")}
            for members in REGIONS.values()
            for silo in members
        }
        data = DataConfig.model_validate({"clients": clients})
        alone = run_federation(load_recipe(recipe).model_copy(update={"data": data}), tmp_path / "alone")
        one = load_server(tmp_path / "alone" / "checkpoint.safetensors")
        two = load_server(root.runs / "whole" / "checkpoint.safetensors")
        np.testing.assert_allclose(two.shared.vector, one.shared.vector, rtol=1e-4, atol=1e-6)
        assert two.silos == {"north": 2, "south": 2}
        assert not list((root.runs / "whole").rglob("personal"))
        for name, region in regions.items():
            wait_until((region.runs / "inside" / "summary.json").exists, f"the end of {name}")
            inside = json.loads((region.runs / "inside" / "summary.json").read_text())
            assert sorted(inside["clients"]) == sorted(REGIONS[name])
            for silo in REGIONS[name]:
                theirs, ours = (one["clients"][silo]["nll"]["global"] for one in (inside, alone))
                assert theirs == pytest.approx(ours, rel=1e-3)
    assert not any(region.left for region in (root, *regions.values()))
