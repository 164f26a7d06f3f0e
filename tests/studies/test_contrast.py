"""Entries against the reference: on the same rows, over the seeds that both have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError
from flexperts.files import opened, sealed
from flexperts.recipe import load_recipe
from flexperts.reports.cells import MISSING, Table
from flexperts.reports.html import html_report
from flexperts.reports.markdown import markdown_report
from flexperts.reports.summary import summary
from flexperts.reports.tables import tables
from flexperts.seeding import derive_seed
from flexperts.studies.collect import collect_comparison, collect_run
from flexperts.studies.entries import plan_comparison
from flexperts.studies.runner import run_comparison
from flexperts.studies.statistics import Paired, paired_bootstrap

Json = dict[str, Any]
Entries = dict[str, Json]
OWN = {"fedavg": "global", "flex": "personalized", "local": "personalized", "zero_shot": "zero_shot"}
CLIENTS = ["bank", "cafe", "farm"]
OTHERS = ["fedavg", "local", "zero_shot", "k2"]


def lines(out: Path, name: str, seed: int, client: str) -> list[Json]:
    path = out / "runs" / name / f"seed-{seed}" / "predictions" / f"{client}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def change(path: Path, how: Callable[[Json], None]) -> None:
    """Edit every line of a JSON-lines file, or the one value of a JSON file."""
    many = path.suffix == ".jsonl"
    values = [json.loads(t) for t in path.read_text().splitlines()] if many else [json.loads(path.read_text())]
    for value in values:
        how(value)
    path.write_text("\n".join(json.dumps(value) for value in values))


def paired(out: Path, name: str, seed: int, kind: str) -> Paired:
    differences, weights, rows = {}, {}, {}
    for client in CLIENTS:
        ours, theirs = lines(out, name, seed, client), lines(out, "flex", seed, client)
        assert [line["instruction"] for line in ours] == [line["instruction"] for line in theirs]
        states = OWN.get(name, "personalized"), "personalized"
        pairs = [
            [line["scores"][s] for line, s in zip(both, states, strict=True)]
            for both in zip(ours, theirs, strict=True)
        ]
        rows[client] = [f"{line['instruction']}|{line['context']}|{line['response']}" for line in ours]
        differences[client] = np.array([a[kind] - b[kind] for a, b in pairs])
        weights[client] = np.array([1.0 if kind == "rouge_l" else a["tokens"] for a, _ in pairs])
    return Paired(differences, weights, rows)


def bootstrap(out: Path, name: str, kind: str, *, seeds: tuple[int, ...] = (0, 1), same_rows: bool = True) -> Json:
    stream = np.random.default_rng(derive_seed(0, "bootstrap", kind, name))
    of_seeds = [paired(out, name, seed, kind) for seed in seeds]
    return vars(paired_bootstrap(of_seeds, same_rows=same_rows, resamples=500, generator=stream))


def by_name(comparison: Json) -> Entries:
    return {entry["name"]: entry for entry in comparison["entries"]}


def without(out: Path, tmp_path: Path, *runs: str) -> Path:
    """Return a copy of a comparison in which some runs have not finished."""
    copy = shutil.copytree(out, tmp_path / "copy")
    for run in runs:
        (copy / "runs" / run / "done").unlink()
    return copy


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """The smallest rate at which each hypothesis is rejected, by trying every cut of the sorted list."""
    ranked = sorted(p_values)
    count = len(ranked)
    return [min(1.0, *(q * count / (i + 1) for i, q in enumerate(ranked) if q >= p)) for p in p_values]


@pytest.mark.parametrize("kind", ["rouge_l", "nll"])
def test_against_is_the_paired_bootstrap_of_the_rows(entries: Entries, compared: Path, kind: str) -> None:
    found = {name: entries[name]["against"][kind] for name in OTHERS}
    for name, test in found.items():
        assert {k: v for k, v in test.items() if k != "p_adjusted"} == bootstrap(compared, name, kind)
        assert test["low"] <= test["difference"] <= test["high"]
    adjusted = benjamini_hochberg([test["p"] for test in found.values()])
    assert [test["p_adjusted"] for test in found.values()] == pytest.approx(adjusted, rel=1e-12)
    assert len({test["p"] for test in found.values()}) > 1
    assert entries["flex"]["against"] is None


@pytest.mark.parametrize("kind", ["rouge_l", "nll"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_difference_is_that_of_the_scores(entries: Entries, name: str, kind: str) -> None:
    ours, theirs = (entries[n]["scores"][entries[n]["own_state"]]["own"][kind]["mean"] for n in (name, "flex"))
    assert entries[name]["against"][kind]["difference"] == pytest.approx(ours - theirs, rel=1e-9, abs=1e-12)


def test_rows_that_differ_by_seed_are_drawn_seed_by_seed(compared: Path, tmp_path: Path) -> None:
    """As where every seed holds out test rows of its own."""
    out = shutil.copytree(compared, tmp_path / "copy")
    for path in out.glob("runs/*/seed-1/predictions/farm.jsonl"):
        change(path, lambda line: line.update(instruction=f"{line['instruction']} again"))
    found = by_name(collect_comparison(out))
    for name in OTHERS:
        for kind in ("rouge_l", "nll"):
            test = {k: v for k, v in found[name]["against"][kind].items() if k != "p_adjusted"}
            assert test == bootstrap(out, name, kind, same_rows=False)
    assert bootstrap(out, "fedavg", "nll", same_rows=False) != bootstrap(out, "fedavg", "nll", same_rows=True)


@pytest.mark.parametrize("field", ["instruction", "context", "response"])
def test_other_rows_are_refused(compared: Path, tmp_path: Path, field: str) -> None:
    out = shutil.copytree(compared, tmp_path / "copy")
    change(
        out / "runs" / "local" / "seed-1" / "predictions" / "cafe.jsonl",
        lambda line: line.update({field: line[field] + "!"}),
    )
    with pytest.raises(
        ArtifactError, match=r"local/seed-1 and .*flex/seed-1: compared runs must be scored on the same rows"
    ):
        collect_comparison(out)


def test_other_seeds_are_left_out_of_the_pairs_only(compared: Path, tmp_path: Path, comparison: Json) -> None:
    out = without(compared, tmp_path, "fedavg/seed-1")
    found, whole = collect_comparison(out), by_name(comparison)
    assert found["seeds"] == [0, 1]
    entries = by_name(found)
    fedavg = entries["fedavg"]
    assert fedavg["seeds"] == [0]
    own = fedavg["scores"]["global"]["own"]
    for kind in ("rouge_l", "nll"):
        assert own[kind]["seeds"] == whole["fedavg"]["scores"]["global"]["own"][kind]["seeds"][:1]
        assert own[kind]["std"] is None
        assert {c["std"] for c in own[kind]["clients"].values()} == {None}
        test = {k: v for k, v in fedavg["against"][kind].items() if k != "p_adjusted"}
        assert test == bootstrap(out, "fedavg", kind, seeds=(0,))
        assert entries["local"]["against"][kind]["p"] == whole["local"]["against"][kind]["p"]
    assert entries["flex"]["scores"] == whole["flex"]["scores"]


def test_without_a_common_seed_there_is_no_test(compared: Path, tmp_path: Path) -> None:
    found = by_name(collect_comparison(without(compared, tmp_path, "flex/seed-0", "fedavg/seed-1")))
    assert found["fedavg"]["against"] is None
    assert found["local"]["against"]["nll"]["difference"] == pytest.approx(
        found["local"]["scores"]["personalized"]["own"]["nll"]["seeds"][1]
        - found["flex"]["scores"]["personalized"]["own"]["nll"]["seeds"][0]
    )


def test_an_entry_that_has_not_finished_is_left_out(compared: Path, tmp_path: Path) -> None:
    out = without(compared, tmp_path, "k2/seed-0", "k2/seed-1")
    found = collect_comparison(out)
    assert list(by_name(found)) == ["fedavg", "flex", "local", "zero_shot"]
    adjusted = benjamini_hochberg([by_name(found)[n]["against"]["nll"]["p"] for n in OTHERS[:-1]])
    assert [by_name(found)[n]["against"]["nll"]["p_adjusted"] for n in OTHERS[:-1]] == pytest.approx(adjusted)


def test_an_unfinished_reference_is_refused(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="flex of copy: the reference has no finished run"):
        collect_comparison(without(compared, tmp_path, "flex/seed-0", "flex/seed-1"))


def test_questions_are_collected_where_every_seed_has_them(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared, tmp_path / "copy")
    for seed in (0, 1):
        for name, states in (("flex", OWN["flex"]), ("fedavg", "global")):
            who = CLIENTS if name == "flex" else CLIENTS[:1]
            asked = {c: {"accuracy": 0.25 + 0.125 * seed + 0.0625 * i} for i, c in enumerate(who)}
            if (name, seed) != ("fedavg", 1):
                change(
                    out / "runs" / name / f"seed-{seed}" / "beyond.json",
                    lambda found, s=states, a=asked: found.update(mmlu={s: a}),  # type: ignore[misc]
                )
    found = by_name(collect_comparison(out))
    accuracy = found["flex"]["scores"]["personalized"]["mmlu"]["accuracy"]
    assert accuracy["seeds"] == [0.3125, 0.4375]
    assert accuracy["mean"] == 0.375
    assert accuracy["std"] == pytest.approx(0.125 / 2**0.5)
    assert accuracy["clients"]["farm"]["mean"] == 0.4375
    assert found["flex"]["scores"]["global"]["mmlu"] is None
    assert found["fedavg"]["scores"]["global"]["mmlu"] is None


def test_a_run_is_the_comparison_of_its_own_seed(work: Path, single: Path, entries: Entries) -> None:
    found = collect_run(single)
    assert (found["reference"], found["seeds"], found["title"]) == ("flex", [0], "single")
    assert list(by_name(found)) == ["flex", "fedavg"]
    for name, entry in by_name(found).items():
        assert entry["settings"] == []
        for state, scores in entry["scores"].items():
            for place in ("own", "others", "general"):
                for kind in ("rouge_l", "nll"):
                    whole = entries[name]["scores"][state][place][kind]
                    assert scores[place][kind]["seeds"] == whole["seeds"][:1], (name, state, place)
                    assert scores[place][kind]["std"] is None
        assert entry["routing"] == entries[name]["routing"]
        assert entry["selection"] == entries[name]["selection"]
    test = by_name(found)["fedavg"]["against"]["nll"]
    means = [entries[n]["scores"][OWN[n]]["own"]["nll"]["seeds"][0] for n in ("fedavg", "flex")]
    assert test["difference"] == pytest.approx(means[0] - means[1], rel=1e-9)
    assert test["p_adjusted"] == test["p"]


def test_a_run_alone(work: Path, tmp_path: Path) -> None:
    run_federation(
        load_recipe(work / "recipe.toml", ("method.name=zero_shot", "knowledge={}", "seed=7")), tmp_path / "r"
    )
    found = collect_run(tmp_path / "r")
    (entry,) = found["entries"]
    assert (entry["name"], entry["seeds"], entry["against"], found["seeds"]) == ("zero_shot", [7], None, [7])
    assert entry["scores"]["zero_shot"]["general"] is None


def test_a_comparison_is_read_back_without_its_runs(compared: Path, tmp_path: Path, comparison: Json) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    (tmp_path / "runs").mkdir()  # of something else
    assert collect_comparison(tmp_path) == comparison
    (tmp_path / "runs").rmdir()
    shutil.copy(compared / "compare.json", tmp_path)
    assert collect_comparison(tmp_path) == comparison


@pytest.mark.parametrize("text", ["[1]", "{}", '{"kind": "run"}', "{"])
def test_what_is_no_comparison_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"comparison\.json"):
        collect_comparison(tmp_path)


def test_a_score_that_is_no_number_has_no_test_and_the_others_are_adjusted_without_it(
    compared: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(compared, tmp_path / "copy")

    def void(line: Json) -> None:
        line["scores"]["personalized"] |= {"rouge_l": None, "nll": None}

    change(copy / "runs" / "local" / "seed-1" / "predictions" / "cafe.jsonl", void)
    found = by_name(collect_comparison(copy))
    assert found["local"]["against"] == {}
    for kind in ("rouge_l", "nll"):
        left = [name for name in OTHERS if name != "local"]
        tests = [found[name]["against"][kind] for name in left]
        assert [test["p_adjusted"] for test in tests] == pytest.approx(
            benjamini_hochberg([test["p"] for test in tests])
        )


def test_where_the_reference_has_no_number_nothing_is_compared_and_pages_are_made(
    compared: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(compared, tmp_path / "copy")

    def void(line: Json) -> None:
        line["scores"]["personalized"]["nll"] = None

    for seed in (0, 1):
        change(copy / "runs" / "flex" / f"seed-{seed}" / "predictions" / "bank.jsonl", void)
    comparison = collect_comparison(copy)
    assert all(set(entry["against"] or {}) <= {"rouge_l"} for entry in comparison["entries"])
    json.dumps(comparison, allow_nan=False)
    assert html_report(comparison)
    assert markdown_report(comparison)


def test_a_silo_with_one_test_row_leaves_a_difference_without_interval(compared: Path, tmp_path: Path) -> None:
    """Nothing tells how much another row would differ."""
    out = shutil.copytree(compared, tmp_path / "copy")
    for path in out.glob("runs/*/seed-*/predictions/bank.jsonl"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    found = collect_comparison(out)
    test = by_name(found)["local"]["against"]["nll"]
    assert np.isfinite(test["difference"])
    assert {key: value for key, value in test.items() if key != "difference"} == dict.fromkeys(
        ("low", "high", "p", "p_adjusted")
    )
    row = next(row for row in tables(found)["main"].rows if row[0].text == "local")
    assert "–" in [cell.text for cell in row]
    assert "includes 0" not in html_report(found)


def cells(table: Table, name: str, column: str) -> list[Any]:
    """Return an entry's cells in the columns of one name."""
    row = next(row for row in table.rows if row[0].text.split(" ")[0] == name)
    return [cell for cell, head in zip(row, table.header, strict=True) if head.name.startswith(column)]


def test_nll_over_other_tokens_is_not_compared_and_the_rest_is(
    compared: Path, tmp_path: Path, comparison: Json
) -> None:
    out = shutil.copytree(compared, tmp_path / "copy")

    def shorter(line: Json) -> None:
        line["scores"]["personalized"] |= {"tokens": 1, "nll": 0.001}

    change(out / "runs" / "local" / "seed-1" / "predictions" / "cafe.jsonl", shorter)
    for seed in (0, 1):
        path = out / "runs" / "local" / f"seed-{seed}" / "summary.json"
        summed = opened(path, json.loads(path.read_text()))
        for its in summed["clients"].values():
            its["nll"]["personalized"] = 0.001
        path.write_text(json.dumps(sealed(summed)))
    changed = collect_comparison(out)
    found, whole = by_name(changed), by_name(comparison)
    assert found["local"]["other_tokens"] == {"rows": 26, "differ": 4}
    assert [name for name in found if "other_tokens" in found[name]] == ["local"]
    assert list(found["local"]["against"]) == ["rouge_l"]
    assert found["local"]["against"] == {"rouge_l": whole["local"]["against"]["rouge_l"]}
    assert (found["local"]["silos"]["nll"]["improvement"], found["local"]["silos"]["nll"]["harmed"]) == (None, None)
    assert found["local"]["silos"]["nll"]["iqm"]["value"] == pytest.approx(0.001)
    assert found["local"]["silos"]["rouge_l"] == whole["local"]["silos"]["rouge_l"]
    left = [name for name in OTHERS if name != "local"]
    tests = [found[name]["against"]["nll"] for name in left]
    adjusted = benjamini_hochberg([test["p"] for test in tests])
    assert [test["p_adjusted"] for test in tests] == pytest.approx(adjusted)
    made = tables(changed)
    said = "local: its NLL is over other tokens than the reference's: 4 of 26 rows differ. Such an NLL is neither"
    assert said in made["main"].note
    for key, column in (("main", "NLL"), ("clients-nll", "mean"), ("robust", "IQM"), ("spread", "mean")):
        assert not cells(made[key], "local", column)[-1 if key == "robust" else 0].best, key
        marked = [row for row in made[key].rows if any(cell.best for cell in row)]
        assert marked, key
    assert cells(made["robust"], "local", "P(better")[1].text == MISSING
    assert cells(made["spread"], "local", "harmed")[0].text == MISSING
    assert not [line for line in summary(changed) if line.startswith("local") and "best NLL" in line]
    assert said in html_report(changed).replace("&#39;", "'")
    assert said in markdown_report(changed)


def test_a_limit_that_cuts_texts_elsewhere_is_no_better_nll(tmp_path: Path, speaking_base: Path) -> None:
    for side, count in (("train", 3), ("test", 3)):
        texts = [{"text": f"{side} {i} {'e t a o i n ' * (4 + 10 * (i > 0))}"} for i in range(count)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    recipe = f"""
        [model]
        base = "{speaking_base}"
        dtype = "float32"
        precision = "fp32"
        [data.clients.one]
        train = "train.jsonl"
        test = "test.jsonl"
        [evaluation]
        max_new_tokens = 1
        [federation]
        rounds = 1
        [compare]
        seeds = 2
        resamples = 100
        entries = ["long", "also_long", "short"]
        [compare.variants]
        long = ["method.name=zero_shot", "training.max_length=250"]
        also_long = ["method.name=zero_shot", "training.max_length=240"]
        short = ["method.name=zero_shot", "training.max_length=80"]
    """
    (tmp_path / "recipe.toml").write_text(recipe)
    assert run_comparison(plan_comparison(tmp_path / "recipe.toml"), tmp_path / "out") == []
    comparison = collect_comparison(tmp_path / "out")
    found = by_name(comparison)
    assert found["short"]["other_tokens"] == {"rows": 6, "differ": 4}
    assert "nll" not in found["short"]["against"]
    assert found["also_long"]["against"]["nll"]["difference"] == 0
    assert "other_tokens" not in found["also_long"]
    assert [row[0].text.split(" ")[0] for row in tables(comparison)["main"].rows][-1] == "short"
