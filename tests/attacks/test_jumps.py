"""A server cannot push a silo's personal states out by rounds that the run does not have, or has had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.communication.messages import records
from flexperts.config.run import RunConfig
from flexperts.parameters.store import load_personal
from flexperts.parameters.vector import Payload

from .asked_silo import RUN, AskedSilo, moved, silo_file, to_evaluate, to_train

Recipe = Callable[..., RunConfig]
JUMPS = (10**9, 2**62, 3, 0, -1, 1.0, "1", True, [1])


@pytest.fixture
def asked(tmp_path: Path, tiny_base: Path, recipe: Recipe) -> AskedSilo:
    return AskedSilo(silo_file(tmp_path, tiny_base), recipe)


def honest(asked: AskedSilo, text: str, between: Callable[[Payload], None] = lambda start: None) -> list[bytes]:
    """Return a run's replies, and the personal state that it leaves."""
    start = asked.start(text)
    replies = []
    for number in (1, 2):
        replies.append(asked.raw("train", to_train(start, number), text))
        between(start)
        replies.append(asked.raw("evaluate", to_evaluate(start, number), text))
        between(start)
    personal = asked.state / "runs" / RUN / "personal"
    return [*replies, *(path.read_bytes() for path in sorted(personal.rglob("*.safetensors")))]


def test_rounds_that_the_run_does_not_have_are_refused(
    asked: AskedSilo, tmp_path: Path, tiny_base: Path, recipe: Recipe
) -> None:
    text = asked.handed()

    def attack(start: Payload) -> None:
        before = asked.files()
        for number in JUMPS:
            assert asked.refusal("train", to_train(start, number), text) == "FederationError"
            assert asked.refusal("evaluate", to_evaluate(start, number), text) == "FederationError"
        assert asked.files() == before

    attacked = honest(asked, text, attack)
    (tmp_path / "alone").mkdir()
    assert attacked == honest(AskedSilo(silo_file(tmp_path / "alone", tiny_base), recipe), text)


def test_rounds_that_have_been_are_refused(asked: AskedSilo) -> None:
    """Both stored states stay, however often and in whichever order old rounds are asked for again."""
    text = asked.handed("federation.rounds=9")
    start = asked.start(text)
    for number in (1, 2, 7):
        last = asked.raw("train", to_train(moved(start, number / 100), number), text)
    before, personal = asked.files(), asked.state / "runs" / RUN / "personal"
    for number in (6, 2, 1, 5):
        for weights in (start, moved(start, number / 100), moved(start, 1.0)):
            assert "each round once" in asked.refusal("train", to_train(weights, number), text)
        assert "each round once" in asked.refusal("evaluate", to_evaluate(start, number), text)
    assert asked.raw("train", to_train(moved(start, 7 / 100), 7), text) == last
    assert asked.files() == before
    files = (personal / "clinic.safetensors", personal / "before" / "clinic.safetensors")
    assert [load_personal(path)[1].round for path in files] == [7, 2]


@pytest.mark.parametrize("states", [["global", "secret"], ["personalised"], "global"])
def test_states_that_the_method_does_not_have_are_refused(asked: AskedSilo, states: Any) -> None:
    text = asked.handed()
    start = asked.start(text)
    assert asked.refusal("evaluate", to_evaluate(start, 1, states), text) == "FederationError"


def test_a_request_without_its_fields_is_refused(asked: AskedSilo) -> None:
    text = asked.handed()
    start = asked.start(text)
    before = asked.files()
    for missing in ({"round": 1}, {"agreement": "null"}, {"round": 1, "agreement": "["}):
        asked.refusal("train", records(missing, payload=start), text)
        asked.refusal("evaluate", records(missing, payload=start), text)
    assert asked.files() == before
