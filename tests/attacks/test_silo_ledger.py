"""What a silo has released is counted once, on disk, over all runs; beyond the budget it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexperts.artifacts import RunDirectory
from flexperts.cli.main import app
from flexperts.communication.messages import payload_of
from flexperts.communication.wire import deserialize
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloPolicy
from flexperts.deployment import ledger as ledger_module
from flexperts.deployment.kept import kept_runs
from flexperts.deployment.ledger import Ledger
from flexperts.deployment.state import delete_run
from flexperts.engines.grid import InProcessGrid
from flexperts.errors import ArtifactError
from flexperts.files import unwritable
from flexperts.observer import Observer
from flexperts.protection.pipeline import privacy_spent
from flexperts.recipe import parse_recipe
from flexperts.server.checkpoint import load_server
from flexperts.server.serve import serve

from .asked_silo import OTHER, RUN, AskedSilo, moved, silo_file, to_evaluate, to_train

Recipe = Callable[..., RunConfig]
NOISE = ("method.name=fedavg", "privacy.noise=local", "privacy.noise_multiplier=4", "federation.rounds=9")
ONCE = "PolicyError: a silo answers each round once, and a repeated request with the same bytes"


@pytest.fixture
def asked(tmp_path: Path, tiny_base: Path, recipe: Recipe) -> AskedSilo:
    return AskedSilo(silo_file(tmp_path, tiny_base), recipe)


def epsilon_of(text: str, rounds: int) -> float:
    spent = privacy_spent(parse_recipe(text), rounds)
    assert spent is not None
    return float(spent["epsilon"])


def counted(asked: AskedSilo) -> dict[str, float | None]:
    return {kept.run: kept.epsilon for kept in kept_runs(asked.state, "clinic", Ledger(asked.state, SiloPolicy()))}


def test_a_replay_gets_the_same_bytes_and_other_weights_get_none(asked: AskedSilo) -> None:
    """The mean of many noised answers to one request would have no noise."""
    text = asked.handed(*NOISE)
    start = asked.start(text)
    first = asked.raw("train", to_train(start), text)
    assert deserialize(first)[0] == {}
    before = asked.files()
    for _ in range(20):
        assert asked.raw("train", to_train(start), text) == first
    asked.restart()
    assert asked.raw("train", to_train(start), text) == first
    assert asked.raw("train", to_train(start), asked.handed(*NOISE[:-1], "federation.rounds=5")) == first
    for other in (moved(start, 1e-7), moved(start, 1.0)):
        assert asked.refusal("train", to_train(other), text) == ONCE
    assert asked.files() == before
    assert counted(asked) == {RUN: epsilon_of(text, 1)}


def test_noise_is_drawn_anew_in_the_next_round_and_counted(asked: AskedSilo) -> None:
    text = asked.handed(*NOISE)
    start = asked.start(text)
    replies = {asked.raw("train", to_train(start, number), text) for number in (1, 2, 5)}
    assert len(replies) == 3
    assert counted(asked) == {RUN: pytest.approx(epsilon_of(text, 3))}


def test_the_budget_is_for_all_runs_and_outlives_restarts_and_forgetting(
    tmp_path: Path, tiny_base: Path, recipe: Recipe
) -> None:
    asked = AskedSilo(silo_file(tmp_path, tiny_base), recipe)
    text = asked.handed(*NOISE)
    budget = (epsilon_of(text, 3) + epsilon_of(text, 4)) / 2
    asked = AskedSilo(silo_file(tmp_path, tiny_base, 'noise = "local"', f"max_epsilon = {budget}"), recipe)
    start = asked.start(text)
    for number in (1, 2):
        last = asked.raw("train", to_train(start, number), text)
    delete_run(asked.state, RUN)
    asked.restart()
    again = asked.start(text, OTHER)
    asked.answer("train", to_train(again), text, OTHER)
    rule = f"PolicyError: the epsilon of all runs must be at most {budget} at delta 1e-05 (policy.max_epsilon)"
    for run, number in ((OTHER, 2), (RUN, 3), ("a" * 32, 1)):
        asked.start(text, run)
        assert asked.refusal("train", to_train(start, number), text, run) == rule
    assert asked.refusal("train", to_train(start, 2), text) == ONCE  # its reply was deleted
    assert last
    assert counted(asked) == {
        RUN: pytest.approx(epsilon_of(text, 2)),
        OTHER: epsilon_of(text, 1),
        "a" * 32: 0.0,
    }
    said = CliRunner().invoke(app, ["silo", "runs", str(asked.file)], env={"COLUMNS": "120"}).output
    total = f"epsilon of all runs: {epsilon_of(text, 3):.4g} at delta 1e-05; policy.max_epsilon = {budget:g}"
    assert total in said.splitlines()


def test_runs_with_other_noise_compose(asked: AskedSilo) -> None:
    texts = {run: asked.handed(*NOISE, f"privacy.noise_multiplier={z}") for run, z in ((RUN, 3), (OTHER, 4))}
    for run, text in texts.items():
        asked.answer("train", to_train(asked.start(text, run)), text, run)
    ledger = Ledger(asked.state, SiloPolicy())
    both = asked.handed(*NOISE, f"privacy.noise_multiplier={1 / math.sqrt(1 / 9 + 1 / 16)}")
    assert ledger.epsilon(*ledger.runs.values()) == pytest.approx(epsilon_of(both, 1))


@pytest.mark.parametrize(
    "noise", ["privacy.noise=none", "privacy.noise=central", "privacy.noise_multiplier=1e-300"]
)
def test_an_update_without_noise_is_unbounded(asked: AskedSilo, noise: str) -> None:
    text = asked.handed(*NOISE, noise)
    asked.answer("train", to_train(asked.start(text)), text)
    assert counted(asked) == {RUN: math.inf}
    said = CliRunner().invoke(app, ["silo", "runs", str(asked.file)], env={"COLUMNS": "120"}).output
    assert "epsilon of all runs: unbounded at delta 1e-05; no budget" in said.splitlines()


def test_nothing_leaves_that_could_not_be_entered(asked: AskedSilo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a stop, between the reply and the ledger: it was not sent, and does not count."""
    text = asked.handed(*NOISE)
    start = asked.start(text)
    first = asked.raw("train", to_train(start, 1), text)

    def full(path: Path, *_: Any, **__: Any) -> None:
        raise unwritable(path, OSError("no space left"))

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "write_json", full)
        assert asked.refusal("train", to_train(start, 2), text) == "ArtifactError"
    unsent = asked.files()[f"replies/{RUN}/train.safetensors"]
    asked.restart()
    assert asked.refusal("train", to_train(start, 1), text) == ONCE  # the reply that is kept is another round's
    second = asked.raw("train", to_train(start, 2), text)
    assert deserialize(second)[0] == {}
    assert second not in (first, unsent)
    assert counted(asked) == {RUN: pytest.approx(epsilon_of(text, 2))}


def test_a_ledger_that_was_changed_is_refused(asked: AskedSilo) -> None:
    text = asked.handed(*NOISE)
    asked.answer("train", to_train(asked.start(text)), text)
    path = asked.state / "ledger.json"
    record = json.loads(path.read_text())
    record["runs"][RUN]["noised"] = 0.0
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"ledger\.json: it is damaged"):
        asked.restart()


def test_evaluations_are_counted_by_their_weights(tmp_path: Path, tiny_base: Path, recipe: Recipe) -> None:
    asked = AskedSilo(silo_file(tmp_path, tiny_base, "max_evaluations = 2"), recipe)
    text = asked.handed("method.name=fedavg")
    start, states = asked.start(text), ["zero_shot", "global"]
    first = asked.raw("evaluate", to_evaluate(start, 1, states), text)
    assert asked.raw("evaluate", to_evaluate(start, 1, states), text) == first
    second = asked.raw("evaluate", to_evaluate(moved(start, 0.1), 1, states), text)
    assert deserialize(second)[0] == {}
    before = asked.files()
    for content in (to_evaluate(moved(start, 0.2), 1, states), to_evaluate(start, 1, ["global"])):
        told = asked.refusal("evaluate", content, text)
        assert told == "PolicyError: a run may have at most 2 evaluations (policy.max_evaluations)"
    assert asked.files() == before  # the weights of the silo's own model are those of the last answer
    assert asked.raw("evaluate", to_evaluate(moved(start, 0.1), 1, states), text) == second


class StopError(Exception):
    """Ends a server in the middle of a round."""


@pytest.mark.parametrize("noise", ["none", "local"])
def test_a_run_that_crashed_in_a_round_resumes_as_if_it_had_not(
    asked: AskedSilo, tmp_path: Path, noise: str
) -> None:
    """The server asks the round again, with the same weights: this is no attack."""
    text = asked.handed("federation.rounds=3", "method.name=fedavg", f"privacy.noise={noise}")
    config, replies = parse_recipe(text), {}

    def serve_until(out: Path, stop: int | None) -> bytes:
        run = RunDirectory.create_or_resume(out, text)

        def node(kind: str, content: Any) -> Any:
            reply = asked.answer(kind, content, text, run.run_id)
            if kind == "train":
                number = content.config_records["info"]["round"]
                replies.setdefault((out, number), []).append(payload_of(reply, "clinic").vector.tobytes())
                if number == stop:
                    raise StopError
            return reply

        serve(InProcessGrid({1: node}), config, run, Observer())
        return load_server(run.checkpoint).shared.vector.tobytes()

    with pytest.raises(StopError):
        serve_until(tmp_path / "crashed", 2)
    asked.restart()
    resumed = serve_until(tmp_path / "crashed", None)
    once, again = replies[tmp_path / "crashed", 2]
    assert once == again
    if noise == "none":
        assert resumed == serve_until(tmp_path / "whole", None)
    else:
        run = RunDirectory.open(tmp_path / "crashed").run_id
        assert counted(asked)[run] == pytest.approx(epsilon_of(text, 3))
