"""What a floor brought, from records made by hand: share harmed, worst tenth, regret, and their intervals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from flexperts.artifacts import RunDirectory
from flexperts.files import read_json, read_lines, sealed, write_json
from flexperts.reports.html import html_report
from flexperts.reports.tables import tables
from flexperts.studies import floor
from flexperts.studies.collect import collect_comparison
from flexperts.studies.finished import Finished
from flexperts.studies.floor import floors, harmed
from flexperts.studies.statistics import Paired, paired_bootstrap, worst_tenth

from ..scripts import script  # noqa: TID252

CLIENTS = {f"c{i}": 0.1 * (i - 3) for i in range(10)}
"""Client -> what it keeps minus global: three are better off, one is equal, six are harmed."""


def finished(tmp_path: Path, **changes: Any) -> Finished:
    """One seed whose clients keep the personalized model; row by row, a client's differences are equal."""
    predictions = {}
    for client, difference in CLIENTS.items():
        base = [2.0, 3.0, 1.0]
        by_row = {"zero_shot": [5.0] * 3, "global": base, "personalized": [n + difference for n in base]}
        means = {
            name: sum(n * t for n, t in zip(rows, (1, 2, 1), strict=True)) / 4 for name, rows in by_row.items()
        }
        test = {"nll": means, "rows": by_row, "tokens": [1, 2, 1]} | changes
        record = {"base": "b", "chosen": "personalized", "validation": test, "test": test}
        write_json(tmp_path / "floor" / f"{client}.json", sealed(record))
        predictions[client] = [{"instruction": f"{client} {i}", "context": "", "response": ""} for i in range(3)]
    entry = Finished("flex", (), {0: RunDirectory(tmp_path)})
    entry.__dict__["summaries"] = [{"clients": CLIENTS}]
    entry.__dict__["predictions"] = {0: predictions}
    return entry


def test_by_hand(tmp_path: Path) -> None:
    found = floors(finished(tmp_path), 0.95, 200)
    assert found is not None
    assert found["kept"] == {"personalized": 10}
    assert found["against"].keys() == {"zero_shot", "global", "personalized", "best"}
    against = found["against"]["global"]
    # Equal differences in all rows: every resample gives the same.
    for kind, value in (("mean", 0.15), ("harmed", 0.6), ("worst", 0.6)):
        assert [against[kind][end] for end in ("difference", "low", "high")] == pytest.approx([value] * 3)
    regret = found["against"]["best"]
    assert regret["mean"]["difference"] == pytest.approx(sum(d for d in CLIENTS.values() if d > 0) / 10)
    assert regret["harmed"]["difference"] == pytest.approx(0.6)
    assert found["against"]["zero_shot"]["harmed"]["difference"] == 0
    assert found["against"]["personalized"]["mean"] == {"difference": 0, "low": 0, "high": 0}


def test_a_tenth_is_at_least_one_client_and_equal_is_not_harmed() -> None:
    assert worst_tenth(np.array([0.1, 0.5, -1.0])) == 0.5
    assert worst_tenth(np.arange(40.0)) == pytest.approx(37.5)
    assert harmed(np.array([0.0, -0.1, 0.2, 0.3])) == 0.5


def test_a_share_varies_with_the_rows_and_the_default_is_the_mean() -> None:
    draw = np.random.default_rng(3)
    differences = {name: draw.normal(0.0, 1.0, 12) for name in CLIENTS}
    pairs = [Paired(differences, {name: np.ones(12) for name in CLIENTS})] * 2
    how: dict[str, Any] = {"same_rows": True, "resamples": 400}
    plain, mean = (
        paired_bootstrap(pairs, generator=np.random.default_rng(1), over=over, **how)
        for over in (None, lambda table: table.mean(axis=0))
    )
    assert vars(plain) == pytest.approx(vars(mean))
    share = paired_bootstrap(pairs, generator=np.random.default_rng(1), over=harmed, **how)
    assert share.difference == np.mean([values.mean() > 0 for values in differences.values()])
    assert 0 < share.low < share.high < 1


def test_no_floor_without_scores_of_every_client(tmp_path: Path) -> None:
    entry = finished(tmp_path)
    (tmp_path / "floor" / "c3.json").unlink()
    assert floors(entry, 0.95, 200) is None


def test_a_choice_without_finite_scores_is_left_out(tmp_path: Path) -> None:
    nll = {"zero_shot": None, "global": 2.25, "personalized": 2.0}
    found = floors(finished(tmp_path, nll=nll), 0.95, 200)
    assert found is not None
    assert "zero_shot" not in found["against"]


def test_the_table_says_what_was_kept(tmp_path: Path) -> None:
    floor = floors(finished(tmp_path), 0.95, 200)
    entry = {
        "name": "flex",
        "own_state": "personalized",
        "scores": {},
        "seeds": [0],
        "method": "flex",
        "floor": floor,
    }
    comparison = {
        "entries": [entry], "clients": [*CLIENTS], "seeds": [0], "split": "test", "confidence": 0.95,
        "reference": "flex", "resamples": 200,
    }  # fmt: skip
    table = tables(comparison)["floor"]
    assert [row[1].text for row in table.rows] == [
        "all zero-shot",
        "all global",
        "all personalized",
        "each's best",
    ]
    assert [cell.text for cell in table.rows[1][2:]] == [
        "+60 [+60, +60]", "+0.150 [+0.150, +0.150]", "+0.600 [+0.600, +0.600]"
    ]  # fmt: skip
    assert "personalized 10" in table.note


def test_a_regret_and_its_interval_are_never_below_zero(tmp_path: Path) -> None:
    """The kept model is worse by 0.05, but better on the row with the most tokens."""
    rows = {"global": [2.0, 3.0, 1.0], "personalized": [2.5, 2.8, 1.1]}
    found = floors(finished(tmp_path, rows=rows, nll={"global": 2.25, "personalized": 2.3}), 0.95, 200)
    assert found is not None
    regret, to_global = found["against"]["best"], found["against"]["global"]
    assert regret["mean"]["difference"] == pytest.approx(0.05)
    assert to_global["mean"]["low"] < 0
    assert regret["mean"]["low"] == 0 < regret["mean"]["high"]


def test_rows_are_the_same_rows_where_their_texts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds with two of three rows in common: what rows add must be counted for these."""
    entry = finished(tmp_path)
    first = entry.predictions[0]
    other = {client: [*rows[1:], {**rows[0], "instruction": f"{client} new"}] for client, rows in first.items()}
    entry = Finished(entry.name, (), {0: RunDirectory(tmp_path), 1: RunDirectory(tmp_path)})
    entry.__dict__["summaries"] = [{"clients": CLIENTS}] * 2
    entry.__dict__["predictions"] = {0: first, 1: other}
    seen: list[Any] = []

    def spy(seeds: Any, **settings: Any) -> Any:
        seen.append((seeds, settings["same_rows"]))
        return paired_bootstrap(seeds, **settings)

    monkeypatch.setattr(floor, "paired_bootstrap", spy)
    assert floors(entry, 0.95, 200) is not None
    for seeds, same_rows in seen:
        assert not same_rows
        assert seeds[0].rows["c1"] == [(f"c1 {i}", "", "") for i in range(3)]
        assert seeds[1].rows["c1"] == [*seeds[0].rows["c1"][1:], ("c1 new", "", "")]


def kept_by(out: Path, name: str) -> dict[tuple[int, str], list[float]]:
    """Write what an entry's clients keep: bank a local model, the others global; return its NLL by row."""
    found = {}
    for path in sorted((out / "runs" / name).glob("seed-*/predictions/*.jsonl")):
        lines, seed = read_lines(path), int(path.parts[-3].removeprefix("seed-"))
        rows = {state: [line["scores"][state]["nll"] for line in lines] for state in ("zero_shot", "global")}
        rows["local"] = [nll - 0.1 * (i + 1 + seed) for i, nll in enumerate(rows["global"])]
        tokens = [line["scores"]["global"]["tokens"] for line in lines]
        nll = {
            state: sum(n * t for n, t in zip(its, tokens, strict=True)) / sum(tokens) for state, its in rows.items()
        }
        test = {"nll": nll, "rows": rows, "tokens": tokens}
        chosen = "local" if path.stem == "bank" else "global"
        record = {"base": "b", "chosen": chosen, "validation": test, "test": test}
        write_json(path.parents[1] / "floor" / f"{path.stem}.json", sealed(record))
        found[seed, path.stem] = [nll[chosen], *rows[chosen]]
    return found


def test_an_entry_with_a_floor_is_scored_by_what_its_silos_keep(
    compared: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In scores, tests against the reference and measures over silos; also of runs that were packed."""
    out = shutil.copytree(compared, tmp_path / "study")
    kept = kept_by(out, "k2")
    claim = read_json(out / "compare.json")
    write_json(out / "compare.json", claim | {"newcomers": ["new"]})
    scores = {"nll": {"zero_shot": 5.0, "global": 1.5}, "rouge_l": {"zero_shot": 5.0, "global": 20.0}}
    test = {"nll": {"local": 1.25}, "rows": {"local": [1.0, 1.5]}, "tokens": [1, 1]}
    for run in (out / "runs" / "k2").glob("seed-?"):
        write_json(run / "joined" / "new.json", sealed(scores))
        write_json(run / "floor" / "new.json", sealed({"base": "b", "chosen": "local", "test": test}))
    found = collect_comparison(out)
    entry, before = ({e["name"]: e for e in its["entries"]}["k2"] for its in (found, collect_comparison(compared)))
    assert (entry["own_state"], entry["trained_state"], before["own_state"]) == ("chosen", *["personalized"] * 2)
    own = entry["scores"]["chosen"]["own"]
    for client, its in own["nll"]["clients"].items():
        assert its["mean"] == pytest.approx(fmean(kept[seed, client][0] for seed in (0, 1)))
    assert own["nll"]["mean"] == pytest.approx(fmean(means[0] for means in kept.values()))
    assert own["rouge_l"]["mean"] is None
    assert entry["scores"]["personalized"] == before["scores"]["personalized"]
    reference = next(e for e in found["entries"] if e["name"] == "flex")["scores"]["personalized"]["own"]["nll"]
    assert entry["against"]["nll"]["difference"] == pytest.approx(own["nll"]["mean"] - reference["mean"])
    assert "rouge_l" not in entry["against"]
    means = sorted(means[0] for means in kept.values())
    assert entry["silos"]["nll"]["iqm"]["value"] == pytest.approx(fmean(means[1:-1]))
    assert entry["silos"]["nll"]["improvement"] != before["silos"]["nll"]["improvement"]

    made = tables(found)
    for key in ("main", "clients-nll", "robust", "spread"):
        row = next(row for row in made[key].rows if row[0].text == "k2")
        assert row[1].text == "chosen"
    states = [c.group for c in made["main"].header]
    assert (
        next(row for row in made["main"].rows if row[0].text == "k2")[states.index("own state, own test")].text
        == "–"
    )
    ranked = [row[0].text.removesuffix(" (reference)") for row in made["main"].rows]
    nll = {e["name"]: e["scores"][e["own_state"]]["own"]["nll"]["mean"] for e in found["entries"]}
    assert [name for name in ranked if name in nll] == sorted(nll, key=lambda name: nll[name])
    assert "sorted by NLL" in made["main"].note
    assert "Own state chosen" in made["main"].note
    assert "chosen" in html_report(found)
    newcomers = {row[1].text: row for row in made["newcomers"].rows}
    assert newcomers["k2"][[c.group for c in made["newcomers"].header].index("chosen")].text == "1.250 ± 0.000"

    keeping = script("benchmarks/keep_study.py")
    monkeypatch.setattr(keeping, "HERE", str(work))
    keeping.pack(out, tmp_path / "runs.tar.xz")
    keeping.unpack(tmp_path / "runs.tar.xz", tmp_path / "again" / "study")
    again = collect_comparison(tmp_path / "again" / "study")
    assert json.dumps(again["entries"]) == json.dumps(found["entries"])
    assert collect_comparison(tmp_path / "again" / "study", samples=2)["examples"] == {}  # no answers are packed

    path = out / "runs" / "k2" / "seed-1" / "floor" / "bank.json"
    path.unlink()  # without all choices nothing is known of what the entry's silos keep
    left = {e["name"]: e for e in collect_comparison(out)["entries"]}["k2"]
    assert left["own_state"] == "personalized"
