"""A comparison's measures over silos and seeds, computed again from what its runs left on the disk."""

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
CLIENTS = ["bank", "cafe", "farm"]
KINDS = ("rouge_l", "nll")
OWN = {"fedavg": "global", "flex": "personalized"}


def scores(out: Path, entry: Json, kind: str) -> dict[str, list[float]]:
    """Return client -> score by seed of the entry's own state, from the summaries."""
    found: dict[str, list[float]] = {}
    for seed in (0, 1):
        summary = json.loads((out / "runs" / entry["name"] / f"seed-{seed}" / "summary.json").read_text())
        for client in CLIENTS:
            found.setdefault(client, []).append(summary["clients"][client][kind][entry["own_state"]])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_of_the_own_state_and_know_which_end_is_better(
    comparison: Json, entries: dict[str, Json], compared: Path, kind: str
) -> None:
    lower = kind == "nll"
    reference = scores(compared, entries["flex"], kind)
    for name, entry in entries.items():
        ours, found = scores(compared, entry, kind), entry["silos"][kind]
        ranked = sorted(value for values in ours.values() for value in values)
        assert found["iqm"]["value"] == pytest.approx(fmean(ranked[1:-1]), rel=1e-12)  # of six, one at each end
        assert found["iqm"]["low"] <= found["iqm"]["value"] <= found["iqm"]["high"]
        means = {client: fmean(values) for client, values in ours.items()}
        worst = (max if lower else min)(means, key=lambda client: means[client])
        assert found["worst"] == {"client": worst, "value": pytest.approx(means[worst], rel=1e-12)}
        assert found["worst_tenth"] == found["worst"]["value"]  # of three silos
        if name == comparison["reference"]:
            assert (found["improvement"], found["harmed"]) == (None, None)
            continue
        sign = -1 if lower else 1
        pairs = [[(sign * a > sign * b) + (a == b) / 2 for a in ours[c] for b in reference[c]] for c in CLIENTS]
        assert found["improvement"]["value"] == pytest.approx(fmean(fmean(each) for each in pairs))
        harmed = sum(sign * means[c] < sign * fmean(reference[c]) for c in CLIENTS)
        assert (found["harmed"]["count"], found["harmed"]["silos"]) == (harmed, 3)
    assert entries["zero_shot"]["silos"]["nll"]["harmed"]["count"] == 3


def test_a_score_that_is_missing_leaves_no_measure_of_its_kind(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    path = out / "runs" / "local" / "seed-1" / "summary.json"
    summary = opened(path, json.loads(path.read_text()))
    summary["clients"]["cafe"]["nll"]["personalized"] = None
    path.write_text(json.dumps(sealed(summary)))
    found = {entry["name"]: entry["silos"] for entry in collect_comparison(out)["entries"]}
    assert list(found["local"]) == ["rouge_l"]
    assert list(found["fedavg"]) == list(KINDS)


def test_seeds_that_only_one_entry_has_are_not_compared(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    shutil.rmtree(out / "runs" / "fedavg" / "seed-1")
    found = {entry["name"]: entry["silos"]["nll"] for entry in collect_comparison(out)["entries"]}
    ours, reference = (scores(compared, {"name": name, "own_state": state}, "nll") for name, state in OWN.items())
    better = fmean((ours[c][0] < reference[c][0]) + (ours[c][0] == reference[c][0]) / 2 for c in CLIENTS)
    assert found["fedavg"]["improvement"]["value"] == pytest.approx(better)


def test_silos_that_are_drawn_anew_in_each_seed_are_other_silos(compared: Path, tmp_path: Path) -> None:
    """A seed of one entry is compared with the same seed of the other: another seed's rows are other rows."""
    out = shutil.copytree(compared, tmp_path / "out")
    for path in out.glob("runs/*/seed-1/predictions/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(f"{json.dumps({**line, 'instruction': line['instruction'] + ' 1'})}\n" for line in lines)
        )
    comparison = collect_comparison(out)
    assert comparison["redrawn"]
    assert "Each seed has other rows" in tables(comparison)["clients-nll"].note
    found = {entry["name"]: entry["silos"]["nll"] for entry in comparison["entries"]}
    ours, reference = (scores(compared, {"name": name, "own_state": state}, "nll") for name, state in OWN.items())
    pairs = [(a, b) for c in CLIENTS for a, b in zip(ours[c], reference[c], strict=True)]
    assert found["fedavg"]["improvement"]["value"] == pytest.approx(fmean((a < b) + (a == b) / 2 for a, b in pairs))
    assert found["fedavg"]["harmed"]["count"] == sum(a > b for a, b in pairs)
    assert found["fedavg"]["harmed"]["silos"] == 6
    assert found["fedavg"]["worst"]["value"] == pytest.approx(
        max(value for values in ours.values() for value in values)
    )
    assert found["fedavg"]["worst"]["client"].endswith((", seed 0", ", seed 1"))
