"""What a region's root reads at the region's door: replies, the same ones again, and errors without text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import RecordDict
from tests.federation.scripted_grid import FOUR, START, Silo, StopError
from tests.federation.test_regions import OPEN, Tier

from flexperts.communication.messages import payload_of, records
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.deployment import region_door
from flexperts.deployment.region_door import RegionDoor

Recipe = Callable[..., RunConfig]


INSIDE = (*FOUR, *OPEN, "federation.deadline=25")
"""The region's recipe."""


@pytest.fixture
def config(recipe: Recipe) -> RunConfig:
    """The root's recipe."""
    return recipe(*FOUR, *OPEN)


@pytest.fixture
def tier(recipe: Recipe, tmp_path: Path) -> Tier:
    (tmp_path / "region").mkdir()
    return Tier("north", recipe(*INSIDE), tmp_path, Silo("a", 3), Silo("b", 5))


def asked(config: RunConfig, number: int, kind: str = "train") -> bytes:
    content = records({"run": "r", "round": number, "agreement": "null"}, payload=START)
    return serialize({"kind": kind, "run": "r", "recipe": config.to_toml()}, content)


def test_a_request_that_is_repeated_gets_the_same_bytes(config: RunConfig, tier: Tier, tmp_path: Path) -> None:
    first = RegionDoor(tier.region, tmp_path / "region").reply(asked(config, 1))
    trained = len(tier.grid.asked)
    tier.open()  # it was stopped, and has started again
    assert RegionDoor(tier.region, tmp_path / "region").reply(asked(config, 1)) == first
    again = [kind for kind, _ in tier.grid.asked[trained:]]
    assert "train" not in again
    fields, content = deserialize(first)
    assert fields == {}
    assert payload_of(content, "north").size == START.size


def test_a_region_that_is_killed_before_its_reply_is_kept_trains_again(
    config: RunConfig, tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint must not have a round whose mean it cannot send."""

    def kill(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(region_door, "write_bytes", kill)
        RegionDoor(tier.region, tmp_path / "region").reply(asked(config, 1))
    tier.open()
    fields, content = deserialize(RegionDoor(tier.region, tmp_path / "region").reply(asked(config, 1)))
    assert fields == {}
    assert payload_of(content, "north").size == START.size
    assert [sorted(log["clients"]) for log in tier.region.run.rounds()] == [["a", "b"]]


@pytest.mark.parametrize("place", [0, -1])
def test_a_kept_reply_that_is_damaged_is_not_sent(
    config: RunConfig, tier: Tier, tmp_path: Path, place: int
) -> None:
    """The silos train again where the round is not over; else the root gets an error, and not other weights."""
    folder = tmp_path / "region"
    first = RegionDoor(tier.region, folder).reply(asked(config, 1))
    kept = bytearray((folder / "train.reply").read_bytes())
    kept[place] ^= 1
    (folder / "train.reply").write_bytes(kept)
    tier.open()
    second = RegionDoor(tier.region, folder).reply(asked(config, 1))
    assert second != first
    assert deserialize(second)[0] == {"error": "FederationError"}


def test_errors_are_named_and_not_told(config: RunConfig, recipe: Recipe, tier: Tier, tmp_path: Path) -> None:
    folder = tmp_path / "region"
    door = RegionDoor(tier.region, folder)
    other = recipe(*FOUR, *OPEN, "training.lr=1e-9")
    requests = {
        "FederationError": (asked(config, 0, "query.keys"), asked(other, 1)),
        "KeyError": (serialize({"run": "r"}, RecordDict()),),
        "ValueError": (None,),
    }
    for name, many in requests.items():
        for request in many:
            fields, content = deserialize(door.reply(request))
            assert fields == {"error": name}
            assert not content
    assert not list(folder.iterdir())


def test_a_root_that_cannot_read_the_measures_is_refused_on_joining(
    config: RunConfig, recipe: Recipe, tmp_path: Path
) -> None:
    """Before silos train, because with noise every round costs them some of their privacy."""
    (folder := tmp_path / "region").mkdir()
    noised = recipe(*INSIDE, "privacy.noise=local")
    tier = Tier("north", noised, tmp_path, Silo("a", 3), Silo("b", 5))
    join = serialize({"kind": "query.join", "run": "r", "recipe": config.to_toml()}, records({"run": "r"}))
    assert deserialize(RegionDoor(tier.region, folder).reply(join))[0] == {"error": "FederationError"}


def test_a_finished_region_stays_until_its_root_has_the_last_evaluation(recipe: Recipe, tmp_path: Path) -> None:
    """The root lost the last reply: it joins again, takes the start, and asks once more."""
    config = recipe(*FOUR, *OPEN, "federation.rounds=1")
    (folder := tmp_path / "region").mkdir()
    tier = Tier("north", recipe(*INSIDE, "federation.rounds=1"), tmp_path, Silo("a", 3), Silo("b", 5))
    told = {"run": "r", "round": 1, "agreement": "null", "states": ["zero_shot", "global"], "answers": True}
    evaluate = serialize({"kind": "evaluate", "run": "r", "recipe": config.to_toml()}, records(told, payload=START))
    join = serialize({"kind": "query.join", "run": "r", "recipe": config.to_toml()}, records({"run": "r"}))
    door = RegionDoor(tier.region, folder)
    closed = []
    for request in (join, asked(config, 1), evaluate):
        last = door.reply(request)
        closed.append(door.closed)
    assert closed == [False, False, True]
    tier.open()
    again = RegionDoor(tier.region, folder)
    assert tier.region.finished
    assert "error" not in deserialize(again.reply(join))[0]
    assert not again.closed
    assert again.reply(evaluate) == last
    assert again.closed
