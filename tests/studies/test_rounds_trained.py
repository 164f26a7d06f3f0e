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


def without(out: Path, seed: int, number: int, client: str) -> None:
    """Let a client not have trained in a round of the reference."""
    path = out / "runs" / "flex" / f"seed-{seed}" / "rounds.jsonl"
    rounds = [opened(path, json.loads(line)) for line in path.read_text().splitlines()]
    del rounds[number - 1]["clients"][client]
    path.write_text("".join(f"{json.dumps(sealed(record))}\n" for record in rounds))


def scored(out: Path, entry: str, seed: int, client: str, state: str) -> float:
    summary = json.loads((out / "runs" / entry / f"seed-{seed}" / "summary.json").read_text())
    return float(summary["clients"][client]["nll"][state])


def test_each_group_has_the_mean_of_the_silos_and_seeds_that_trained_equally_often(
    compared: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    few = [(0, 1, "bank"), (1, 2, "bank"), (1, 1, "farm")]  # of two rounds
    for seed, number, client in few:
        without(out, seed, number, client)
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


def test_silos_that_trained_equally_often_have_no_table(comparison: Json, compared: Path, tmp_path: Path) -> None:
    assert not any(entry["rounds_trained"] for entry in comparison["entries"])
    assert "rounds_trained" not in tables(comparison)
    out = shutil.copytree(compared, tmp_path / "out")
    without(out, 0, 1, "bank")
    shutil.rmtree(out / "runs" / "local" / "seed-1")  # would be the mean of other silos and seeds
    found = {entry["name"]: entry["rounds_trained"] for entry in collect_comparison(out)["entries"]}
    assert not found["local"]
    assert found["fedavg"]
