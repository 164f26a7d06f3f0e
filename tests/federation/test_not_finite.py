"""What is no number: the base is named before round 1, a diverged client after it, and no file holds NaN."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ModelError
from flexperts.finished.joining import join
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer
from flexperts.reports.html import html_report
from flexperts.reports.markdown import markdown_report
from flexperts.reports.tables import tables
from flexperts.studies.collect import collect_run
from flexperts.terminal.display import score_notes, score_table

from .scripted_grid import FOUR, ScriptedGrid, Watch, changed, run_on, trio

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
NAN, INF = math.nan, math.inf


class Notices(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


def broken(base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a copy of a base whose weights are changed."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def put(name: str, value: float, *place: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        [found] = [key for key in weights if key.endswith(name)]
        weights[found][place] = value

    return change


WEIGHTS = {
    "one expert": (put("layers.1.mlp.experts.2.down_proj.weight", NAN, 3, 1), "layers.1.mlp.experts.down_proj[2]"),
    "infinity": (put("layers.0.mlp.experts.0.up_proj.weight", -INF, 0, 0), "layers.0.mlp.experts.gate_up_proj[0]"),
    "router": (put("layers.0.mlp.gate.weight", INF, 1, 1), "layers.0.mlp.gate.weight"),
    "norm": (put("model.norm.weight", NAN, 5), "model.norm.weight"),
    "a token": (put("embed_tokens.weight", NAN, 200, 0), "embed_tokens.weight"),
    "head": (put("lm_head.weight", INF, 7, 7), "lm_head.weight"),
}


@pytest.mark.parametrize("where", WEIGHTS)
@pytest.mark.parametrize("method", ["zero_shot", "flex"])
def test_a_base_with_a_weight_that_is_no_number_is_refused_by_name(
    recipe: Recipe, tiny_base: Path, tmp_path: Path, where: str, method: str
) -> None:
    change, name = WEIGHTS[where]
    base = broken(tiny_base, tmp_path / "base", change)
    with pytest.raises(ModelError, match=r"model\.base = .*NaN or infinity") as refused:
        run_federation(recipe(f"model.base={base}", f"method.name={method}"), tmp_path / "run")
    assert name in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_base_that_computes_no_number_from_finite_weights_is_refused(
    recipe: Recipe, tiny_base: Path, tmp_path: Path
) -> None:
    def grow(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith(("v_proj.weight", "o_proj.weight")):
                weights[name] *= 1e37

    base = broken(tiny_base, tmp_path / "base", grow)
    with pytest.raises(ModelError, match=r"untouched base's loss is nan"):
        run_federation(recipe(f"model.base={base}", "method.name=local"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def strict(path: Path) -> Any:
    """Return a file's value, or values by line, as JSON has them."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{path}: {constant}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines() if line.strip()]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> tuple[Path, dict[str, Any], list[str]]:
    """A run whose personal experts took one step of 1e30."""
    out, notices = tmp_path_factory.mktemp("diverged") / "run", Notices()
    config = recipe("training.local_steps=1", "training.personal_lr=1e30", "federation.rounds=1")
    return out, run_federation(config, out, notices), notices.said


def test_a_client_that_diverged_has_null_and_the_reason(diverged: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, summary, said = diverged
    assert json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail).items() >= summary.items()
    for client in summary["clients"].values():
        assert client["nll"]["personalized"] is client["rouge_l"]["personalized"] is None
        assert math.isfinite(client["nll"]["global"])
    for mean in (summary["mean"], summary["weighted_mean"]):
        assert mean["nll"]["personalized"] is mean["rouge_l"]["personalized"] is None
        assert math.isfinite(mean["nll"]["global"])
    assert [*summary["not_finite"]] == [*summary["clients"]]
    assert all("diverged" in states["personalized"] for states in summary["not_finite"].values())
    assert len([text for text in said if "personalized" in text and "diverged" in text]) == 4


def test_no_file_of_it_holds_anything_but_json(diverged: tuple[Path, dict[str, Any], list[str]]) -> None:
    out = diverged[0]
    assert strict(out / "rounds.jsonl")[0]["scores"]["shop"]["nll.personalized"] is None
    for path in out.rglob("*.jsonl"):
        strict(path)
    for path in out.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    [row, *_] = strict(out / "predictions" / "shop.jsonl")
    assert row["scores"]["personalized"]["nll"] is row["scores"]["personalized"]["rouge_l"] is None


def test_its_tables_and_pages_show_dashes(diverged: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, summary, _ = diverged
    table = score_table(summary)
    assert [str(column.header) for column in table.columns][-1] == "flex personalized"
    assert [*table.columns[-1].cells] == ["-"] * 5
    assert any("clinic, personalized: no score" in line for line in score_notes(summary))
    comparison = collect_run(out)
    json.dumps(comparison, allow_nan=False)
    for page in (html_report(comparison), markdown_report(comparison)):
        assert "diverged" in page
        assert "nan" not in page.lower().replace("finance", "")
    assert tables(comparison)["main"].rows[0][2].text == "–"


def test_its_models_give_no_answer_where_the_logits_are_none(
    diverged: tuple[Path, dict[str, Any], list[str]],
) -> None:
    run = TrainedRun(diverged[0])
    assert isinstance(run.generate("shop", "Hello", state="global"), str)
    with pytest.raises(ModelError, match="shop's personalized model: its logits are not finite"):
        run.generate("shop", "Hello")
    scores = run.evaluate()["shop"]
    assert scores["personalized"].metrics() == {"rouge_l": None, "nll": None}
    run.close()


def test_a_newcomer_that_diverges_is_recorded_so(recipe: Recipe, tmp_path: Path) -> None:
    run_federation(recipe("training.local_steps=1", "federation.rounds=1"), tmp_path / "run")
    rows = [{"instruction": f"ask {i}", "response": f"say {i}"} for i in range(8)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notices = Notices()
    settings = ["training.personal_lr=1e30"]
    record = join(tmp_path / "run", tmp_path / "new.jsonl", steps=1, settings=settings, observer=notices)
    assert record["nll"]["personalized"] is None
    assert "diverged" in record["not_finite"]["personalized"]
    assert any("new, personalized" in text for text in notices.said)
    json.loads((tmp_path / "run" / "joined" / "new.json").read_text(), parse_constant=pytest.fail)
    assert [*TrainedRun(tmp_path / "run").joined] == ["new"]  # its checksum fits


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["nll", "rouge_l"])
def test_what_a_silo_sends_is_null_where_it_is_no_number(
    recipe: Recipe, tmp_path: Path, value: float, kind: str
) -> None:
    grid, watch = ScriptedGrid(*trio()), Watch()
    told: list[str] = []
    watch.notice = told.append  # type: ignore[method-assign]
    grid.faults["evaluate", 4, "b"] = changed(metrics={f"{kind}.global": value})
    run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["clients"]["b"][kind]["global"] is None
    assert summary["clients"]["b"]["rouge_l"]["global"] is None  # an answer by such a model has no score
    assert summary["clients"]["a"][kind]["global"] == 3
    assert summary["mean"][kind]["global"] is summary["weighted_mean"][kind]["global"] is None
    assert (summary["mean"]["nll"]["global"] is None) == (kind == "nll")
    assert summary["mean"]["nll"]["zero_shot"] == 5
    assert [*summary["not_finite"]] == ["b"]
    assert [text.split(":")[0] for text in told] == ["b, global"]


def test_it_is_said_once_however_often_a_run_evaluates(recipe: Recipe, tmp_path: Path) -> None:
    grid, watch, told = ScriptedGrid(*trio()), Watch(), []
    watch.notice = told.append  # type: ignore[method-assign]
    for number in range(1, 5):
        grid.faults["evaluate", number, "b"] = changed(metrics={"nll.global": NAN})
    run_on(grid, recipe(*FOUR, "evaluation.every=1"), tmp_path / "run", watch)
    assert len(told) == 1


def test_the_base_is_named_where_its_own_score_is_no_number(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*trio())
    grid.faults["evaluate", 4, "b"] = changed(metrics={"nll.zero_shot": NAN, "nll.global": NAN})
    run_on(grid, recipe(*FOUR), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [*summary["not_finite"]["b"]] == ["zero_shot", "global"]
    assert all("the cause is the base" in reason for reason in summary["not_finite"]["b"].values())
