"""What must not grow with clients that do not take part: files, encoded rows, comparisons of all with all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flexperts.client import workspace as module
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError
from flexperts.finished.joining import join
from flexperts.methods.fedavg import FedAvg

from .scripted_grid import ScriptedGrid, Silo, run_on

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
SHORT = (
    "federation.rounds=1",
    "federation.participation=0.25",
    "evaluation.clients=1",
    "evaluation.rows=1",
    "evaluation.max_new_tokens=1",
)


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.*")}


def log_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLEx run in which one of four clients trains and one is scored; tests must not write into it."""
    out = tmp_path_factory.mktemp("many") / "run"
    run_federation(recipe(*SHORT), out)
    return out


def test_only_who_trains_or_is_scored_prepares_and_has_files(finished: Path) -> None:
    log = log_of(finished)
    trained, scored = set(log["participants"]), set(log["scores"])
    assert len(trained) == len(scored) == 1
    assert files(finished / "personal") == files(finished / "selection") == trained | scored
    assert files(finished / "predictions") == scored


def test_who_is_not_scored_is_in_no_table_and_not_reported_missing(finished: Path) -> None:
    summary, log = json.loads((finished / "summary.json").read_text()), log_of(finished)
    assert list(summary["clients"]) == list(log["scores"])
    assert summary["unscored"] == log["unscored"] == {}
    assert summary["mean"]["nll"]["global"] == next(iter(summary["clients"].values()))["nll"]["global"]


def test_a_newcomer_cannot_take_the_name_of_a_client_that_never_took_part(finished: Path, tmp_path: Path) -> None:
    log = log_of(finished)
    idle = {"clinic", "help_desk", "law_firm", "shop"} - {*log["participants"], *log["scores"]}
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"q{i}", "response": "a"} for i in range(5)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in idle:
        with pytest.raises(ArtifactError, match="has files of that name"):
            join(finished, rows, name=name)


def test_a_method_that_must_know_what_clients_chose_has_them_choose_on_joining(
    recipe: Recipe, tmp_path: Path
) -> None:
    run_federation(recipe(*SHORT, "graft.sharing=both"), tmp_path / "run")
    assert len(files(tmp_path / "run" / "selection")) == 4


def scored(recipe: Recipe, folder: Path, *settings: str) -> list[str]:
    grid = ScriptedGrid(*(Silo(f"c{number:02}", 3) for number in range(30)))
    run_on(grid, recipe("method.name=fedavg", "evaluation.every=1", *settings), folder)
    rounds = [json.loads(line)["scores"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    asked = [who for kind, who in grid.asked if kind == "evaluate"]
    assert asked == [who for found in rounds for who in found]
    assert all(list(found) == list(rounds[0]) for found in rounds)
    return list(rounds[0])


def test_the_same_clients_are_scored_in_every_round_seed_and_method(recipe: Recipe, tmp_path: Path) -> None:
    first = scored(recipe, tmp_path / "a", "evaluation.clients=4")
    assert len(first) == 4
    assert first == sorted(first) != [f"c{number:02}" for number in range(4)]
    others = ("seed=7", "method.name=fedavgm", "federation.participation=0.1")
    assert scored(recipe, tmp_path / "b", "evaluation.clients=4", *others) == first
    assert set(first) < set(scored(recipe, tmp_path / "c", "evaluation.clients=5"))
    assert len(scored(recipe, tmp_path / "d", "evaluation.clients=31")) == 30


def test_clients_that_all_fit_are_agreed_upon_at_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def agree(self: FedAvg, reports: Mapping[str, Any]) -> Any:
        sizes.append(len(reports))
        return len(reports)

    monkeypatch.setattr(FedAvg, "agree", agree)
    grid = ScriptedGrid(*(Silo(f"c{number:02}", 3) for number in range(30)))
    server, _ = run_on(grid, recipe("method.name=fedavg"), tmp_path / "run")
    assert sizes == [30]
    assert server.agreement == 30


def test_encoded_rows_are_kept_of_the_last_clients_only(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLIENTS_KEPT", 2)
    workspace = Workspace(recipe())
    clinic = workspace.examples("clinic")
    assert len(clinic) == 8
    assert workspace.examples("shop") is workspace.examples("shop")
    assert workspace.examples("clinic") is clinic
    workspace.examples("help_desk")
    workspace.examples("law_firm")
    again = workspace.examples("clinic")
    assert again == clinic
    assert again is not clinic
