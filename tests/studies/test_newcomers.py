"""Clients that a comparison leaves out of its runs, and that join the finished ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.artifacts import RunDirectory
from flexperts.client.client import Client
from flexperts.client.workspace import Workspace
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, DataError
from flexperts.files import read_json
from flexperts.finished.joining import Newcomer, join
from flexperts.finished.trained import TrainedRun
from flexperts.recipe import load_recipe
from flexperts.reports.html import html_report
from flexperts.reports.tables import tables
from flexperts.studies import runner
from flexperts.studies.collect import collect_comparison
from flexperts.studies.entries import ComparisonPlan, plan_comparison
from flexperts.studies.runner import HEAVY, jobs, run_comparison

Planned = Callable[..., ComparisonPlan]
SMALL = ("federation.rounds=1", "training.local_steps=2", "evaluation.others_rows=0", "knowledge={}")
FARM = 'compare.newcomers=["farm"]'
ENTRIES = ["fedavg", "flex"]


@pytest.fixture(scope="module")
def kept(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs as ordinary ones that farm's files join by hand."""
    out = tmp_path_factory.mktemp("by-hand")
    settings = (*SMALL, 'data.leave_out=["farm"]')
    for name in ENTRIES:
        run_federation(load_recipe(work / "recipe.toml", (*settings, f"method.name={name}")), out / name)
    return out


@pytest.fixture(scope="module")
def with_newcomer(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with farm as a newcomer, which was interrupted while farm joined flex; tests must not write."""
    plan = plan_comparison(work / "recipe.toml", (*SMALL, FARM), entries=ENTRIES, seeds=1)
    out, evaluate, trained = tmp_path_factory.mktemp("newcomers") / "out", Newcomer.evaluate, Client.train

    def stopped(newcomer: Newcomer, *arguments: Any, **options: Any) -> Any:
        if newcomer.method.name == "flex":
            raise KeyboardInterrupt
        return evaluate(newcomer, *arguments, **options)

    def again(*_: Any) -> Any:
        raise AssertionError("the rounds of the run were finished")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Newcomer, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_comparison(plan, out)
        fedavg, flex = jobs(plan, out)
        assert (fedavg.done, flex.done) == (True, False)
        assert not [name for name in HEAVY if (fedavg.folder / name).exists()]
        assert sorted(name for name in HEAVY if (flex.folder / name).exists()) == sorted(HEAVY)
        patch.setattr(Newcomer, "evaluate", evaluate)
        patch.setattr(Client, "train", again)
        assert run_comparison(plan, out) == []
        patch.setattr(Client, "train", trained)
    assert not [name for name in HEAVY if (flex.folder / name).exists()]
    return out


def test_it_joins_as_by_hand_and_is_in_no_mean(work: Path, with_newcomer: Path, kept: Path) -> None:
    comparison = collect_comparison(with_newcomer)
    assert (comparison["clients"], comparison["newcomers"]) == (["bank", "cafe"], ["farm"])
    entries = {entry["name"]: entry for entry in comparison["entries"]}
    for name, entry in entries.items():
        summary = RunDirectory.open(kept / name).summary()
        for state, scores in entry["scores"].items():
            for kind in ("rouge_l", "nll"):
                assert {c: s["mean"] for c, s in scores["own"][kind]["clients"].items()} == {
                    client: its[kind][state] for client, its in summary["clients"].items()
                }
    farm = work / "clients" / "farm"
    record = join(kept / "flex", farm / "train.jsonl", test=farm / "test.jsonl", name="farm")
    found = entries["flex"]["newcomers"]
    assert list(found) == ["zero_shot", "global", "personalized"]
    for state, scores in found.items():
        for kind in ("rouge_l", "nll"):
            assert scores[kind]["clients"]["farm"]["mean"] == record[kind][state]
    noted = read_json(with_newcomer / "runs" / "flex" / "seed-0" / "joined" / "farm.json")
    assert (noted["steps"], noted["shared"], noted["data"]) == (record["steps"], record["shared"], None)


def test_without_a_personal_part_it_has_the_global_model(with_newcomer: Path, kept: Path, work: Path) -> None:
    comparison = collect_comparison(with_newcomer)
    found = next(entry for entry in comparison["entries"] if entry["name"] == "fedavg")["newcomers"]
    assert list(found) == ["zero_shot", "global"]
    whole = load_recipe(work / "recipe.toml", (*SMALL, "method.name=fedavg"))
    run = TrainedRun(kept / "fedavg")
    try:
        rows = Workspace(whole, run.workspace.base).clients["farm"].test
        assert found["global"]["nll"]["mean"] == run.evaluate(rows={"bank": rows})["bank"]["global"].nll
    finally:
        run.close()
    table = tables(comparison)["newcomers"]
    assert sorted((row[0].text, row[1].text) for row in table.rows) == [("farm", name) for name in ENTRIES]
    shown = {row[1].text: [cell.text for cell in row[2:]] for row in table.rows}
    assert [text == "–" for text in shown["fedavg"]] == [False] * 4 + [True] * 2
    assert "–" not in shown["flex"]
    assert "No model" not in table.note
    assert 'data-key="newcomers"' in html_report(comparison)


def test_where_a_method_has_no_model_for_it_this_is_said(with_newcomer: Path, tmp_path: Path) -> None:
    out = shutil.copytree(with_newcomer, tmp_path / "out")
    (out / "runs" / "fedavg" / "seed-0" / "joined" / "farm.json").unlink()
    comparison = collect_comparison(out)
    assert [entry["name"] for entry in comparison["entries"] if not entry["newcomers"]] == ["fedavg"]
    assert "No model for newcomers: fedavg." in tables(comparison)["newcomers"].note


def test_workers_let_them_join_too(plan: Planned, with_newcomer: Path, tmp_path: Path) -> None:
    assert run_comparison(plan(*SMALL, FARM, entries=ENTRIES, seeds=1), tmp_path / "out", workers=2) == []
    found, expected = (
        [e["newcomers"] for e in collect_comparison(out)["entries"]] for out in (tmp_path / "out", with_newcomer)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert {state: scores["nll"]["mean"] for state, scores in ours.items()} == {
            state: pytest.approx(scores["nll"]["mean"], rel=1e-5) for state, scores in theirs.items()
        }


def test_a_directory_keeps_its_newcomers(plan: Planned, with_newcomer: Path, tmp_path: Path) -> None:
    out = shutil.copytree(with_newcomer, tmp_path / "out")
    for settings, said in (
        (('compare.newcomers=["cafe"]',), r"compare.newcomers: \['farm'\], now \['cafe'\]"),
        (('data.leave_out=["farm"]',), r"compare.newcomers: \['farm'\], now \[\]"),
    ):
        with pytest.raises(ArtifactError, match=said):
            run_comparison(plan(*SMALL, *settings, entries=ENTRIES, seeds=1), out)


@pytest.mark.parametrize(
    ("names", "said"),
    [('"frm"', "no such client; did you mean 'farm'"), ('"bank", "cafe", "farm"', "they name all clients")],
)
def test_names_that_cannot_be_left_out_are_refused_before_anything_is_written(
    plan: Planned, tmp_path: Path, names: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        run_comparison(plan(f"compare.newcomers=[{names}]", entries=ENTRIES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ('compare.newcomers=["bank"]', "data.validation_fraction=0", "data.validation_rows=5"),
            "bank: 9 train rows with data.validation_rows = 5: at most half",
        ),
        (
            (FARM, 'compare.variants={fedavg = ["floor={}"]}'),
            r"farm: 4 validation rows: \[floor\] needs at least 8",
        ),
    ],
)
def test_newcomers_whose_rows_do_not_fit_are_refused_before_anything_is_trained(
    plan: Planned, tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    """They join when a run has finished, but it would be lost then."""
    with pytest.raises(DataError, match=said):
        run_comparison(plan(*SMALL, *settings, entries=ENTRIES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_of_a_client_that_neither_trains_nor_joins_do_not_matter(
    plan: Planned, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(work / "clients", tmp_path / "clients")
    (tmp_path / "clients" / "bank" / "train.jsonl").write_text("no JSON")
    monkeypatch.setattr(runner, "run_federation", lambda *_, **__: None)
    monkeypatch.setattr(runner, "join_left_out", lambda *_: None)
    settings = f"data.folder={tmp_path / 'clients'}", 'data.leave_out=["bank"]', 'compare.newcomers=["cafe"]'
    assert run_comparison(plan(*SMALL, *settings, entries=ENTRIES, seeds=1), tmp_path / "out") == []
