"""Scores by the rounds that clients trained in, counted again from what the runs left on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from flexperts.files import opened, sealed
from flexperts.reports.tables import tables
from flexperts.studies.collect import collect_comparison

Json = dict[str, Any]


TRAINED = ("fedavg", "flex", "local", "k2")


def without(out: Path, entries: tuple[str, ...], seed: int, number: int, client: str) -> None:
    """Let a client not have trained in a round of some entries."""
    for entry in entries:
        path = out / "runs" / entry / f"seed-{seed}" / "rounds.jsonl"
        rounds = [opened(path, json.loads(line)) for line in path.read_text().splitlines()]
        del rounds[number - 1]["clients"][client]
        path.write_text("".join(f"{json.dumps(sealed(record))}\n" for record in rounds))


def scored(out: Path, entry: str, seed: int, client: str, state: str) -> float:
    summary = json.loads((out / "runs" / entry / f"seed-{seed}" / "summary.json").read_text())
    return float(summary["clients"][client]["nll"][state])


def grouped(out: Path) -> dict[str, list[Json]]:
    return {entry["name"]: entry["rounds_trained"] for entry in collect_comparison(out)["entries"]}


def test_each_group_has_the_mean_of_the_silos_and_seeds_that_trained_equally_often(
    compared: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    few = [(0, 1, "bank"), (1, 2, "bank"), (1, 1, "farm")]  # of two rounds
    for seed, number, client in few:
        without(out, TRAINED, seed, number, client)
    comparison = collect_comparison(out)
    by_name = {entry["name"]: entry["rounds_trained"] for entry in comparison["entries"]}
    for name, state in (("fedavg", "global"), ("flex", "personalized"), ("zero_shot", "zero_shot")):
        once = [scored(compared, name, seed, client, state) for seed, _, client in few]
        others = {(s, c) for s in (0, 1) for c in ("bank", "cafe", "farm")} - {(s, c) for s, _, c in few}
        twice = [scored(compared, name, *pair, state) for pair in others]
        assert [(its["rounds"], its["count"]) for its in by_name[name]] == [(1, 3), (2, 3)]
        assert [its["nll"] for its in by_name[name]] == pytest.approx([fmean(once), fmean(twice)])
    table = tables(comparison)["rounds_trained"]
    assert [column.name for column in table.header] == ["entry", "own state", "1 (3)", "2 (3)"]
    shown = {row[0].text: [cell.value for cell in row[2:]] for row in table.rows}
    assert shown == {name: [its["nll"] for its in found] for name, found in by_name.items()}
    assert sum(row[2].best for row in table.rows) == 1
    assert "Left out" not in table.note


def test_silos_that_trained_equally_often_have_no_table(comparison: Json) -> None:
    assert not any(entry["rounds_trained"] for entry in comparison["entries"])
    assert "rounds_trained" not in tables(comparison)


def test_entries_whose_silos_trained_in_other_rounds_or_seeds_are_left_out(compared: Path, tmp_path: Path) -> None:
    """Also the reference: its draw, such as that of a warm-up of all clients, would group the others wrongly."""
    out = shutil.copytree(compared, tmp_path / "out")
    without(out, TRAINED, 0, 1, "bank")
    without(out, ("flex",), 0, 2, "farm")
    shutil.rmtree(out / "runs" / "local" / "seed-1")
    found = grouped(out)
    assert (found["flex"], found["local"]) == ([], [])
    assert [(its["rounds"], its["count"]) for its in found["k2"]] == [(1, 1), (2, 5)]
    assert found["fedavg"]
    assert found["zero_shot"]
    assert "trained in other rounds or seeds: " in tables(collect_comparison(out))["rounds_trained"].note


def test_the_trainer_of_pooled_rows_is_not_a_draw(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    for path in out.glob("runs/fedavg/seed-*/summary.json"):
        summary = opened(path, json.loads(path.read_text())) | {"method": "centralized"}
        path.write_text(json.dumps(sealed(summary)))
    without(out, ("fedavg",), 0, 1, "bank")
    assert not any(grouped(out).values())
