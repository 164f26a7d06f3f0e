"""Runs on preference rows: the floor's choice, comparisons and reports of rewards, newcomers, refusals, memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.artifacts import RunDirectory
from flexperts.client.floor import choose
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.costs.activations import Activations, row_lengths
from flexperts.costs.plan import plan
from flexperts.data.clients import load_clients
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, DataError
from flexperts.finished.joining import join
from flexperts.recipe import parse_recipe
from flexperts.reports.tables import tables
from flexperts.studies.collect import collect
from flexperts.studies.finished import Finished
from flexperts.terminal.display import floor_table, score_table
from flexperts.testing import tiny_model

REWARDS = ("reward_margin", "reward_accuracy")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients with opposite preferences, and a third one that has not taken part."""
    folder = tmp_path_factory.mktemp("preferences")
    for client, order in (("east", 1), ("west", -1), ("north", 1)):
        for side, count in (("train", 20), ("test", 4)):
            answers = [("yes" * (1 + i % 2), "no" * (1 + i % 3))[::order] for i in range(count)]
            lines = (
                {"prompt": f"{side} {i}?", "chosen": chosen, "rejected": rejected}
                for i, (chosen, rejected) in enumerate(answers)
            )
            (folder / client).mkdir(exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / client / f"{side}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def preferring(tiny_model: str, rows: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str) -> RunConfig:
        text = f"""
            {tiny_model}
            [data]
            folder = "{rows}"
            leave_out = ["north"]
            validation_rows = 8
            [training]
            objective = "dpo"
            local_steps = 3
            [federation]
            rounds = 1
            [evaluation]
            max_new_tokens = 2
            others_rows = 2
        """
        return parse_recipe(text, overrides)

    return make


@pytest.fixture(scope="module")
def runs(preferring: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """A run of flex with a floor, and one of fedavg."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for method, more in (("flex", ["floor={}"]), ("fedavg", [])):
        run_federation(preferring(f"method.name={method}", *more), folder / method)
        found[method] = RunDirectory.open(folder / method)
    return found


@pytest.fixture(scope="module")
def comparison(runs: dict[str, RunDirectory]) -> dict[str, Any]:
    finished = [Finished(name, (), {0: run}) for name, run in runs.items()]
    return collect("pairs", (runs["flex"].path / "config.toml").read_text(), finished, "fedavg", resamples=200)


def test_clients_choose_by_the_loss_that_they_train_on(runs: dict[str, RunDirectory]) -> None:
    summary = runs["flex"].summary()
    for client, told in summary["floor"].items():
        record = runs["flex"].of_client("floor", client)
        for side in ("validation", "test"):
            assert record[side]["rows"]["zero_shot"] == pytest.approx([np.log(2)] * len(record[side]["tokens"]))
            assert set(record[side]["tokens"]) == {1}
            for name, loss in record[side]["dpo"].items():
                assert loss == pytest.approx(np.mean(record[side]["rows"][name]))
            assert told[side] == record[side]["dpo"]
        own = runs["flex"].of_client("floor", client)["validation"]
        assert told["chosen"] == record["chosen"] == choose(own["rows"], own["tokens"]) != "zero_shot"
    assert "DPO loss" in str(floor_table(summary).title)


def test_a_summary_holds_rewards_of_every_state(runs: dict[str, RunDirectory]) -> None:
    summary = runs["flex"].summary()
    for kind in REWARDS:
        for state, mean in summary["mean"][kind].items():
            assert mean == pytest.approx(np.mean([its[kind][state] for its in summary["clients"].values()]))
    assert summary["mean"]["reward_margin"]["zero_shot"] == 0
    assert summary["mean"]["reward_margin"]["personalized"] > 0
    assert "reward accuracy" in str(score_table(summary).title)
    lines = (runs["flex"].path / "predictions" / "east.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    assert all(line["rejected"] for line in told)
    margins = [line["scores"]["personalized"]["reward_margin"] for line in told]
    assert np.mean(margins) == pytest.approx(summary["clients"]["east"]["reward_margin"]["personalized"])


def test_a_comparison_tests_rewards(comparison: dict[str, Any], runs: dict[str, RunDirectory]) -> None:
    entry = comparison["entries"][0]
    summaries = [run.summary()["mean"]["reward_margin"] for run in runs.values()]
    expected = summaries[0]["personalized"] - summaries[1]["global"]
    assert entry["against"]["reward_margin"]["difference"] == pytest.approx(expected)
    assert entry["scores"]["personalized"]["own"]["reward_accuracy"]["mean"] is not None
    assert entry["scores"]["global"]["others"]["reward_margin"]["mean"] is not None  # computed from rows
    assert entry["scores"]["personalized"]["others"]["reward_margin"]["mean"] is not None  # measured
    assert {*REWARDS} <= entry["silos"].keys()
    assert entry["floor"]["loss"] == "dpo"


def test_a_report_shows_rewards_and_the_floor_s_loss(comparison: dict[str, Any]) -> None:
    found = tables(comparison)
    assert [column.name for column in found["rewards"].header][2:4] == [
        "reward accuracy, %",
        "Δ reward accuracy, % to reference [95\u00a0%]",
    ]
    assert {row[0].text for row in found["rewards"].rows} == {"flex", "fedavg (reference)"}
    assert found["clients-reward_accuracy"].title == "reward accuracy, % by client"
    assert "DPO loss" in found["floor"].header[2].group
    assert "the DPO loss on its test rows" in found["floor"].note


def test_a_newcomer_joins_by_the_run_s_objective(runs: dict[str, RunDirectory], rows: Path) -> None:
    record = join(
        runs["flex"].path, rows / "north" / "train.jsonl", test=rows / "north" / "test.jsonl", name="north"
    )
    assert record["loss"] < np.log(2)
    assert record["reward_margin"]["zero_shot"] == 0 < record["reward_margin"]["personalized"]
    with pytest.raises(ConfigError, match=r"training\.objective"):
        join(runs["flex"].path, rows / "north", name="other", settings=["training.objective=next_token"])


def test_rows_without_a_rejected_answer_are_refused(
    preferring: Callable[..., RunConfig], rows: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"instruction": f"{i}?", "response": "secret"}) for i in range(20))
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = preferring("data.leave_out=[]", f"data.folder={tmp_path}")
    with pytest.raises(DataError, match="no rejected answer") as caught:
        run_federation(config, tmp_path / "run")
    assert "secret" not in str(caught.value)


def test_memory_is_planned_for_two_answers(preferring: Callable[..., RunConfig], tiny_base: Path) -> None:
    pairs, alone = preferring(), preferring("training.objective=next_token")
    clients = load_clients(pairs.data, pairs.seed)
    longest = max(len(row.rejected) - len(row.response) for its in clients.values() for row in its.train)
    assert longest > 0
    lengths = row_lengths(Workspace(pairs), clients)
    assert lengths.row >= row_lengths(Workspace(alone), clients).row
    model = tiny_model()
    two, one = (Activations(model, config, lengths, 2) for config in (pairs, alone))
    assert two.training(0) == 2 * one.training(0)
    assert two.logits(0, trained=True) == 2 * one.logits(0, trained=True)
    assert two.evaluation() == one.evaluation()
    (planned,) = plan(str(tiny_base), ["fedavg"], ["training.objective=dpo"]).methods
    assert "both answers" in planned.note
