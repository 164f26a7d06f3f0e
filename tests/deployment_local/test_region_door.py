"""What a region's root reads at the region's door: replies, the same ones again, and errors without text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import RecordDict
from tests.federation.scripted_grid import FOUR, START, Silo
from tests.federation.test_regions import OPEN, Tier

from flexperts.communication.messages import payload_of, records
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.deployment.region_door import _reply

Recipe = Callable[..., RunConfig]


@pytest.fixture
def config(recipe: Recipe) -> RunConfig:
    return recipe(*FOUR, *OPEN)


@pytest.fixture
def tier(config: RunConfig, tmp_path: Path) -> Tier:
    (tmp_path / "region").mkdir()
    return Tier("north", config, tmp_path, Silo("a", 3), Silo("b", 5))


def asked(config: RunConfig, number: int, kind: str = "train") -> bytes:
    content = records({"run": "r", "round": number, "agreement": "null"}, payload=START)
    return serialize({"kind": kind, "run": "r", "recipe": config.to_toml()}, content)


def test_a_request_that_is_repeated_gets_the_same_bytes(config: RunConfig, tier: Tier, tmp_path: Path) -> None:
    first = _reply(tier.region, tmp_path / "region", asked(config, 1))
    trained = len(tier.grid.asked)
    tier.open()  # it was stopped, and has started again
    assert _reply(tier.region, tmp_path / "region", asked(config, 1)) == first
    again = [kind for kind, _ in tier.grid.asked[trained:]]
    assert "train" not in again
    fields, content = deserialize(first)
    assert fields == {}
    assert payload_of(content, "north").size == START.size


def test_errors_are_named_and_not_told(config: RunConfig, recipe: Recipe, tier: Tier, tmp_path: Path) -> None:
    door = tmp_path / "region"
    other = recipe(*FOUR, *OPEN, "training.lr=1e-9")
    requests = {
        "FederationError": (asked(config, 0, "query.keys"), asked(other, 1)),
        "KeyError": (serialize({"run": "r"}, RecordDict()),),
        "ValueError": (None,),
    }
    for name, many in requests.items():
        for request in many:
            fields, content = deserialize(_reply(tier.region, door, request))
            assert fields == {"error": name}
            assert not content
    assert not list(door.iterdir())
