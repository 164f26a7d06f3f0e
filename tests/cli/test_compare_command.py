"""`flexperts compare` and `flexperts report`, from recipe to pages."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from flexperts.cli.main import main
from flexperts.config.run import RunConfig
from flexperts.methods.registry import make_method
from flexperts.studies import runner
from flexperts.studies.entries import plan_comparison

FILES = ("comparison.json", "report.html", "report.md")
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[data.silos]
train_rows = 8
test_rows = 4
[training]
max_length = 640
local_steps = 2
lr = 0.05
[federation]
rounds = 1
[evaluation]
max_new_tokens = 2
[compare]
seeds = 2
entries = ["flex", "fedavg", "k2"]
resamples = 200
[compare.variants]
k2 = ["graft.experts=2"]
"""


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process, on a wide terminal: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("COLUMNS", "240")
        patch.setattr(sys, "argv", ["flexperts", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


def refused(answer: tuple[int, str, str], *said: str) -> None:
    code, _, err = answer
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for part in said:
        assert part in line


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    path = tmp_path_factory.mktemp("work") / "tiny.toml"
    path.write_text(RECIPE.format(base=tiny_base))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> tuple[Path, str]:
    """A finished comparison and what was printed."""
    out = recipe.parent / "out"
    code, printed, said = call(
        "compare", recipe, "--methods", "fedavg, flex,k2", "--reference", "flex", "--out", out
    )
    assert (code, said) == (0, "")
    return out, printed


def cells(entry: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """Return numbers of an entry as tables show them, formatted anew: scores, difference, bytes."""
    own, against = entry["scores"][entry["own_state"]]["own"], entry["against"]
    shown = [f"{own[kind]['mean']:.{n}f} ± {own[kind]['std']:.{n}f}" for kind, n in (("rouge_l", 1), ("nll", 3))]
    if entry["name"] != comparison["reference"]:
        numbers = [f"{against['nll'][key]:+.3f}" for key in ("difference", "low", "high")]
        middle, low, high = ("0.000" if float(n) == 0 else n.replace("-", "−") for n in numbers)
        shown += [f"{middle} [{low}, {high}]", f"{against['nll']['p_adjusted']:.3f}"]
    return [*shown, f"{entry['bytes']['uplink_per_client_per_round'] / 1000:.1f} kB"]


def test_a_comparison_is_told_run_by_run_and_shown_as_a_table(finished: tuple[Path, str]) -> None:
    out, printed = finished
    lines = printed.splitlines()
    assert f"6 runs, 0 of them finished already; everything is in {out}" in lines
    names = [(name, seed) for seed in (0, 1) for name in ("fedavg", "flex", "k2")]
    for number, (name, seed) in enumerate(names, 1):
        assert f"[{number}/6] {name}, seed {seed}: finished" in lines
    assert lines[-1] == f"everything is in {out}: report.html to look at, report.md, comparison.json"
    comparison = json.loads((out / "comparison.json").read_text())
    assert [entry["name"] for entry in comparison["entries"]] == ["fedavg", "flex", "k2"]
    for entry in comparison["entries"]:
        (row,) = [line for line in lines if line.startswith(f"│ {entry['name']} ")]
        shown = [cell.strip() for cell in row.split("│")]
        nll, sent = cells(entry, comparison)[1], cells(entry, comparison)[-1]
        assert nll in shown
        assert sent in shown


def test_pages_show_the_numbers_of_the_json(finished: tuple[Path, str]) -> None:
    out, _ = finished
    comparison = json.loads((out / "comparison.json").read_text())
    page = html.unescape((out / "report.html").read_text())
    (table,) = re.findall(r"<table[^>]*>(?:(?!</table>).)*?reference\)(?:(?!</table>).)*</table>", page, re.DOTALL)[
        :1
    ]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)
    in_html = [
        [re.sub(r"<[^>]+>", "", c).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", r, re.DOTALL)] for r in rows
    ]
    in_markdown = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in (out / "report.md").read_text().splitlines()
        if line.startswith("|")
    ]
    for entry in comparison["entries"]:
        name = entry["name"] + (" (reference)" if entry["name"] == "flex" else "")
        for where in (in_html, in_markdown):
            row = next(row for row in where if row and row[0] == name)
            for cell in cells(entry, comparison):
                assert cell in row, (name, cell, row)


def test_a_finished_comparison_is_only_written_anew(
    finished: tuple[Path, str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in FILES}
    for name in FILES:
        (out / name).unlink()
    monkeypatch.setattr(runner, "run_federation", None)
    code, printed, said = call(
        "compare", recipe, "--methods", "fedavg,flex,k2", "--reference", "flex", "--out", out
    )
    assert (code, said) == (0, "")
    assert "6 runs, 6 of them finished already" in printed
    assert "[6/6]" not in printed
    assert {name: (out / name).read_bytes() for name in FILES} == before


def test_a_failing_entry_ends_with_1_and_the_others_stand(
    finished: tuple[Path, str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(out / "runs" / "k2")

    def broken(config: RunConfig, *_: object, **__: object) -> None:
        raise RuntimeError(f"seed {config.seed} is out of luck")

    monkeypatch.setattr(runner, "run_federation", broken)
    code, printed, said = call("compare", recipe, "--out", out)
    assert (code, said) == (1, "")
    for seed in (0, 1):
        path = out / "runs" / "k2" / f"seed-{seed}" / "error.txt"
        assert f"[4/6] k2, seed {seed}: failed: RuntimeError('seed {seed} is out of luck') (see {path})" in printed
    comparison = json.loads((out / "comparison.json").read_text())
    assert [entry["name"] for entry in comparison["entries"]] == ["fedavg", "flex"]
    assert "│ fedavg " in printed
    assert "│ k2 " not in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "flex,fedavgg"], ["entry 'fedavgg'", "did you mean 'fedavg'?"]),
        (["--methods", "flex,flex"], ["names must be unique"]),
        (["--methods", "flex", "--reference", "fedavg"], ["reference 'fedavg'"]),
        (["--seeds", "0"], ["seeds = 0"]),
        (["--set", "compare.variants.k2=['graft.expert=2']"], ["did you mean 'graft.experts'?"]),
        (["--set", "lora.rnak=2"], ["did you mean 'lora.rank'?"]),
    ],
    ids=["name", "twice", "reference", "seeds", "variant", "setting"],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    recipe: Path, tmp_path: Path, options: list[str], said: list[str]
) -> None:
    refused(call("compare", recipe, "--out", tmp_path / "out", *options), *said)
    assert listing(tmp_path) == []


def test_another_recipes_directory_is_refused(finished: tuple[Path, str], recipe: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    refused(call("compare", recipe, "--out", out, "--set", "training.lr=1"), "another recipe", "--set")


# flexperts report


def test_report_on_a_comparison(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    for name in FILES:
        (out / name).unlink()
    code, printed, said = call("report", out)
    assert (code, said) == (0, "")
    assert "│ flex (reference) " in printed
    assert {n: (out / n).read_bytes() for n in FILES} == {n: (finished[0] / n).read_bytes() for n in FILES}


def test_report_on_a_lone_comparison_json(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copy(finished[0] / "comparison.json", tmp_path)
    code, _, said = call("report", tmp_path)
    assert (code, said) == (0, "")
    assert {n: (tmp_path / n).read_bytes() for n in FILES} == {n: (finished[0] / n).read_bytes() for n in FILES}


def test_report_on_a_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    run = shutil.copytree(finished[0] / "runs" / "flex" / "seed-1", tmp_path / "run")
    for _ in range(2):  # the second time with a comparison.json in it
        code, printed, said = call("report", run)
        assert (code, said) == (0, "")
        found = json.loads((run / "comparison.json").read_text())
        assert (found["title"], found["reference"], found["seeds"]) == ("run", "flex", [1])
        whole = json.loads((finished[0] / "comparison.json").read_text())["entries"][1]
        (entry,) = found["entries"]
        own = [e["scores"]["personalized"]["own"]["nll"]["seeds"] for e in (entry, whole)]
        assert own[0] == own[1][1:]
        assert f" {own[0][0]:.3f} " in printed
        assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, ["it holds no run"]),
        ({"comparison.json": "{"}, ["comparison.json: it is damaged"]),
        ({"comparison.json": "[]"}, ["comparison.json: it contains no comparison"]),
        ({"comparison.json": '{"kind": "run"}'}, ["it contains no comparison"]),
        ({"config.toml": "seed = 0"}, ["the run has not finished"]),
    ],
    ids=["empty", "damaged", "list", "other", "unfinished"],
)
def test_report_on_nonsense(tmp_path: Path, files: dict[str, str], said: list[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    refused(call("report", tmp_path), *said)
    assert listing(tmp_path) == sorted(files)


def test_report_on_what_is_not_there(tmp_path: Path) -> None:
    refused(call("report", tmp_path / "none"), "it holds no run")
    assert listing(tmp_path) == []


# What ships


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_what_it_compares(path: Path) -> None:
    plan = plan_comparison(path)
    assert len(plan.entries) >= (2 if plan.base.compare.entries or plan.base.method.reference else 1)
    assert plan.base.compare.reference in {None, *(entry.name for entry in plan.entries)}
    for entry in plan.entries:
        config = plan.config(entry, 0)
        make_method(config.method).check(config)
    defined = plan.base.compare.variants
    # a variant that no entry names is there for --methods: it must be right as well
    assert len(plan_comparison(path, entries=["zero_shot", *defined]).entries) == 1 + len(defined)
    changed = [plan.config(entry, 0).to_toml() for entry in plan.entries]
    assert len(set(changed)) == len(changed)
