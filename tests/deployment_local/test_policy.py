"""A silo's policy as its operator and the server see it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexperts.cli.main import app
from flexperts.communication.messages import info_of, records
from flexperts.config.run import RunConfig
from flexperts.deployment.state import make_private
from flexperts.deployment.worker import Worker
from flexperts.recipe import load_silo

from .asking import RUN, serving, through_relay

Handed = Callable[..., RunConfig]


def with_policy(silo_file: Path, *lines: str) -> Path:
    silo_file.write_text("\n".join([silo_file.read_text(), *lines]))
    return silo_file


def test_the_rule_reaches_the_server_and_what_was_asked_the_silos_log(
    silo_file: Path, handed: Handed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    silo = load_silo(with_policy(silo_file, 'bases = ["mine"]'))
    make_private(Path(silo.state))
    asked = handed().model_copy(update={"model": handed().model.model_copy(update={"base": "\x1b[2Jtheirs"})})
    with serving(Path(silo.state), Worker(silo).reply):
        reply = through_relay(silo_file, asked.to_toml())("query.join", records({"run": RUN}))
    told = "PolicyError: model.base must be one of mine (policy.bases); see that silo's log"
    assert info_of(reply) == {"client": "clinic", "error": told}
    assert "theirs" in caplog.text
    assert "\x1b" not in caplog.text


def test_control_characters_of_a_recipe_do_not_reach_the_log(
    silo_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    silo = load_silo(silo_file)
    make_private(Path(silo.state))
    with serving(Path(silo.state), Worker(silo).reply):
        through_relay(silo_file, '"\\u001b[2Jkey" = 1')("query.join", records({"run": RUN}))
    assert "[2Jkey" in caplog.text
    assert "\x1b" not in caplog.text


def test_silo_check_prints_the_policy_and_tests_a_recipe_against_it(
    silo_file: Path, tmp_path: Path, handed: Handed
) -> None:
    file = with_policy(silo_file, "max_rounds = 2", 'methods = ["flex"]', "scores = false")
    said = CliRunner().invoke(app, ["silo", "check", str(file)])
    assert said.exit_code == 0
    lines = said.output.splitlines()
    assert [line for line in lines if line.startswith("policy")] == [
        "policy: the method must be one of flex (policy.methods)",
        "policy: a run may have at most 2 rounds (policy.max_rounds)",
        "policy: this silo sends no scores (policy.scores)",
        "policy: a score must stand for at least 1 rows (policy.min_score_rows)",
        "policy: a request may have at most 1,073,741,824 bytes (policy.max_message_bytes)",
        "policy: not set: bases, max_runs, max_evaluations, noise, min_noise_multiplier, aggregation, agreement, "
        "max_epsilon, min_clients",
    ]
    planned = tmp_path / "planned.toml"
    for rounds, code in ((2, 0), (3, 1)):
        planned.write_text(handed(f"federation.rounds={rounds}").to_toml())
        said = CliRunner().invoke(app, ["silo", "check", str(file), "--recipe", str(planned)])
        assert said.exit_code == code
    assert "3 rounds: a run may have at most 2 rounds (policy.max_rounds)" in str(said.exception)


def test_silo_runs_prints_what_was_spent_without_any_run(silo_file: Path) -> None:
    said = CliRunner().invoke(app, ["silo", "runs", str(silo_file)], env={"COLUMNS": "120"})
    assert said.output.splitlines()[-1] == "epsilon of all runs: 0 at delta 1e-05; no budget"
