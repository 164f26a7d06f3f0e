"""Whole audits of a tiny run: the control, what an observer sees, what is written, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flexperts.audit import audit as audits
from flexperts.audit.audit import Plan, audit_recipe, audit_run
from flexperts.audit.rounds import Simulation, settings_of
from flexperts.audit.words import word_attack
from flexperts.cli.main import app
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import FlexpertsError
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer
from flexperts.recipe import parse_recipe
from flexperts.reports.audit import audit_markdown, audit_table, sentences, write_audit

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(wide_base: Path) -> Make:
    """Return a function that makes recipes of few rows, with overrides on top."""
    text = f"""
        [model]
        base = "{wide_base}"
        dtype = "float32"
        precision = "fp32"
        [method]
        name = "fedavg"
        [data.silos]
        train_rows = 8
        test_rows = 8
        [training]
        max_length = 640
        batch_size = 8
        [federation]
        rounds = 1
        [evaluation]
        rows = 1
        max_new_tokens = 1
        [privacy]
        clip = 100.0
    """
    return lambda *overrides: parse_recipe(text, overrides)


@pytest.fixture(scope="module")
def run(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run_federation(make(), path)
    return path


@pytest.fixture(scope="module")
def audited(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("audit") / "out"
    result = audit_run(run, (), out, Plan(only=("control", "plain", "secure 3"), secure=(3,)), Observer())
    write_audit(result, out)
    return result, out


def test_the_positive_control_finds_every_word(audited: tuple[dict[str, Any], Path]) -> None:
    result, _ = audited
    words = result["settings"]["control"]["words"]
    assert words["right"] == words["true"] == words["named"] > 10
    assert words["guessed"] < words["right"]
    assert "succeeds" in sentences(result)[1]


def test_the_control_fails_when_the_update_is_noise(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = torch.Generator().manual_seed(0)

    def noise(change: dict[str, torch.Tensor], *others: Any) -> Any:
        return word_attack({n: torch.randn(t.shape, generator=stream) for n, t in change.items()}, *others)

    monkeypatch.setattr(audits, "word_attack", noise)
    result = audit_run(run, (), tmp_path / "out", Plan(only=("control",), secure=(3,)), Observer())
    words = result["settings"]["control"]["words"]
    assert words["right"] < words["true"] / 2
    assert "FAILS" in sentences(result)[1]


def test_under_secure_aggregation_the_observer_has_the_mean_and_no_single_update(run: Path) -> None:
    trained = TrainedRun(run)
    trained.close()
    settings = {its.name: its for its in settings_of(trained.config, 4, (3,))}
    silos = dict([*trained.workspace.clients.items()][:3])

    def seen(name: str, first: str) -> tuple[Any, Any]:
        ordered = {first: silos[first], **silos}
        simulation = Simulation(trained.workspace, trained.server, ordered, run / "personal")
        with simulation.observed(settings[name], settings[name].config(trained.config), silos[first]) as its:
            return its.before.vector, its.after.vector

    first, *_ = silos
    before, mean = seen("secure 3", first)
    singles = [seen("plain", name)[1] - before for name in silos]
    assert np.allclose(mean - before, np.mean(singles, axis=0), atol=1e-6)  # all have as many rows
    assert not any(np.allclose(mean - before, single, atol=1e-4) for single in singles)


def test_the_table_has_every_attack_and_the_settings_that_they_ran_in(audited: tuple[dict[str, Any], Path]) -> None:
    result, _ = audited
    table = audit_table(result)
    assert [row[0].text for row in table.rows] == ["control", "plain", "secure 3"]
    control, plain, secure = result["settings"].values()
    assert (control["steps"], control["rows"], control["optimizer"]) == (1, 1, "sgd")
    assert control["canaries"] is control["membership"] is None
    assert plain["rows"] == 8 + audits.CANARIES * audits.REPEATS
    assert (secure["secure"], secure["silos"], secure["clip"]) == (True, 3, 100.0)
    for its in (plain, secure):
        assert 0 <= its["canaries"]["low"] <= its["canaries"]["value"] <= its["canaries"]["most"] == 7
        assert 0 <= its["membership"]["auc"]["low"] <= its["membership"]["auc"]["high"] <= 1
    assert result["round"] == 2
    assert "lower bound" in sentences(result)[0]
    assert "lower bound" in audit_markdown(result)


def test_no_text_of_a_row_and_no_folder_is_written(
    audited: tuple[dict[str, Any], Path], run: Path, wide_base: Path
) -> None:
    _, out = audited
    trained = TrainedRun(run)
    trained.close()
    rows = [row for its in trained.workspace.clients.values() for row in (*its.train, *its.test)]
    written = [
        path.read_text(encoding="utf-8") for path in out.iterdir() if path.suffix in (".json", ".html", ".md")
    ]
    assert len(written) == 3
    assert not any(str(wide_base.parent) in page for page in written)
    for text in (
        field for row in rows for field in (row.instruction, row.context, row.response) if len(field) > 12
    ):
        assert not any(text in page for page in written)


def test_finished_settings_are_not_repeated_and_another_audit_is_refused(
    audited: tuple[dict[str, Any], Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, out = audited
    monkeypatch.setattr(audits, "_attacked", None)  # a call would fail
    again = audit_run(run, (), out, Plan(only=("plain",), secure=(3,)), Observer())
    assert again["settings"] == result["settings"]
    with pytest.raises(FlexpertsError, match="another audit"):
        audit_run(run, ("privacy.clip=1.0",), out, Plan(secure=(3,)), Observer())


def test_a_recipe_is_run_for_one_round_and_noise_is_audited(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    out = tmp_path / "out"
    plan = Plan(client="law_firm", only=("one step", "local noise"), secure=(3,))
    result = audit_recipe(make("federation.rounds=3"), out, plan, Observer())
    one, noise = result["settings"].values()
    assert result["client"] == "law_firm"
    assert (one["rows"], one["steps"], noise["noise"], noise["noise_multiplier"]) == (8, 1, "local", 1.0)
    assert noise["norm"] > 100 * one["norm"]
    assert json.loads((out / "audit.json").read_text())["settings"].keys() == result["settings"].keys()


@pytest.mark.parametrize(
    ("overrides", "plan", "rule"),
    [
        (("method.name=scaffold", "training.optimizer=sgd"), Plan(), "additive"),
        (("method.name=local",), Plan(), "additive"),
        (("training.objective=dpo",), Plan(), "one answer"),
        (("data.leave_out=['clinic','shop','law_firm']",), Plan(), "other ones"),
        ((), Plan(only=("plane",)), "did you mean 'plain'"),
        ((), Plan(client="nobody"), "no such client"),
        ((), Plan(secure=(40,)), "divided among 40"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_is_trained(
    make: Make, tmp_path: Path, overrides: tuple[str, ...], plan: Plan, rule: str
) -> None:
    with pytest.raises(FlexpertsError, match=rule):
        audit_recipe(make(*overrides), tmp_path / "out", plan, Observer())
    assert not (tmp_path / "out" / "run").exists()


def test_a_runs_rows_and_base_cannot_be_changed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FlexpertsError, match=r"training\.\* and privacy\.\*"):
        audit_run(run, ("data.silos.seed=1",), tmp_path / "out", Plan(), Observer())


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--silos", "2"], "hides no silo"),
        (["--silos", "four"], "hides no silo"),
        (["--base", "x"], "names its base"),
    ],
)
def test_the_command_refuses_wrong_options(tmp_path: Path, arguments: list[str], rule: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[data.silos]\n")
    found = CliRunner().invoke(app, ["audit", str(recipe), *arguments])
    assert isinstance(found.exception, FlexpertsError)
    assert rule in str(found.exception)
