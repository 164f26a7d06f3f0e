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
from flexperts.studies.floor import floors
from flexperts.studies.statistics import paired_bootstrap

from ..scripts import script  # noqa: TID252

CLIENTS = {f"c{i}": 0.1 * (i - 3) for i in range(10)}
"""Client -> what it keeps minus global: three are better off, one is equal, six are harmed."""


def finished(tmp_path: Path, **changes: Any) -> Finished:
    """One seed whose clients keep the personalized model; row by row, a client's differences are equal."""
    predictions = {}
    for client, difference in CLIENTS.items():
        base = [2.0, 3.0, 1.0, 2.0]
        by_row = {"zero_shot": [5.0] * 4, "global": base, "personalized": [n + difference for n in base]}
        means = {
            name: sum(n * t for n, t in zip(rows, (1, 2, 1, 1), strict=True)) / 5 for name, rows in by_row.items()
        }
        test = {"nll": means, "rows": by_row, "tokens": [1, 2, 1, 1]} | changes
        record = {"base": "b", "chosen": "personalized", "validation": test, "test": test}
        write_json(tmp_path / "floor" / f"{client}.json", sealed(record))
        predictions[client] = [{"instruction": f"{client} {i}", "context": "", "response": ""} for i in range(4)]
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
    for kind, value in (("mean", 0.15), ("worst", 0.6)):
        assert [against[kind][end] for end in ("difference", "low", "high")] == pytest.approx([value] * 3)
    assert against["harmed"] == {"count": 6, "clear": 6, "clients": 10}
    regret = found["against"]["best"]
    assert regret["mean"]["difference"] == pytest.approx(sum(d for d in CLIENTS.values() if d > 0) / 10)
    assert regret["harmed"] == {"count": 6, "clear": 6, "clients": 10}
    assert found["against"]["zero_shot"]["harmed"]["count"] == 0
    assert found["against"]["personalized"]["mean"] == {"difference": 0, "low": 0, "high": 0}


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_no_model_is_better_neither_harm_nor_regret_is_found(tmp_path: Path, seeds: int) -> None:
    """Of equal models, one looks worse in half of the clients; about 95 % of the intervals should hold 0."""
    draws, held, clear = np.random.default_rng(3), dict.fromkeys(("worst", "mean", "regret"), 0), 0
    tries = 20
    for _ in range(tries):
        runs = {seed: RunDirectory(tmp_path) for seed in range(seeds)}
        entry, choices, predictions = Finished("flex", (), runs), {}, {}
        row = draws.normal(2, 0.5, size=(16, 1, 60))
        for seed in runs:
            losses = row + draws.normal(0, 0.5, size=(16, 3, 60))
            choices[seed] = {
                f"c{i}": {
                    "chosen": "personalized",
                    "test": {
                        "nll": dict(zip(("global", "local", "personalized"), its.mean(axis=1), strict=True)),
                        "rows": dict(zip(("global", "local", "personalized"), its, strict=True)),
                        "tokens": [1] * 60,
                    },
                }
                for i, its in enumerate(losses)
            }
            predictions[seed] = {
                f"c{i}": [{"instruction": f"{i} {r}", "context": "", "response": ""} for r in range(60)]
                for i in range(16)
            }
        entry.__dict__.update(choices=choices, predictions=predictions)
        found = floors(entry, 0.95, 200)
        assert found is not None
        against, best = found["against"]["global"], found["against"]["best"]
        for name, test in (("worst", against["worst"]), ("mean", against["mean"]), ("regret", best["mean"])):
            held[name] += test["low"] <= 0 <= test["high"]
        clear += against["harmed"]["clear"]
        assert against["harmed"]["count"] > 1
    assert all(count >= 0.8 * tries for count in held.values()), held
    assert clear <= 0.05 * tries * 16


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
        "6 of 10 (6)", "+0.150 [+0.150, +0.150]", "+0.600 [+0.600, +0.600]"
    ]  # fmt: skip
    assert "personalized 10" in table.note


def test_what_is_picked_on_one_half_is_measured_on_the_other(tmp_path: Path) -> None:
    """Global is better by 1 on even rows, personalized on odd ones: a choice by one half loses on the other."""
    rows = {"global": [1.0, 2.0, 1.0, 2.0], "personalized": [2.0, 1.0, 2.0, 1.0]}
    nll = {"global": 1.6, "personalized": 1.4}
    found = floors(finished(tmp_path, rows=rows, nll=nll, tokens=[1, 1, 1, 1]), 0.95, 200)
    assert found is not None
    regret = found["against"]["best"]["mean"]
    # On even rows the best by odd ones is personalized, which is kept; on odd rows it is global, worse by 1.
    assert regret["difference"] == pytest.approx(-0.5)
    worst = found["against"]["global"]["worst"]
    assert worst["difference"] == pytest.approx(0)  # +1 on even rows and -1 on odd ones of whichever client


def test_a_client_with_one_row_has_no_other_half(tmp_path: Path) -> None:
    rows = {"global": [1.0], "personalized": [2.0]}
    entry = finished(tmp_path, rows=rows, nll={name: its[0] for name, its in rows.items()}, tokens=[1])
    entry.__dict__["predictions"] = {0: {client: rows[:1] for client, rows in entry.predictions[0].items()}}
    found = floors(entry, 0.95, 200)
    assert found is not None
    assert "best" not in found["against"]
    assert found["against"]["global"].keys() == {"mean", "harmed"}
    assert found["against"]["global"]["harmed"] == {"count": 10, "clear": 0, "clients": 10}


def test_rows_are_the_same_rows_where_their_texts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds with three of four rows in common: what rows add must be counted for these."""
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
    assert not any(same_rows for _, same_rows in seen)
    whole = [seeds for seeds, _ in seen if "c1" in seeds[0].rows]
    assert whole
    for seeds in whole:
        assert seeds[0].rows["c1"] == [(f"c1 {i}", "", "") for i in range(4)]
        assert seeds[1].rows["c1"] == [*seeds[0].rows["c1"][1:], ("c1 new", "", "")]
    (halves,) = {
        tuple(seeds[0].rows["0 c9"]) for seeds, _ in seen if "0 c9" in seeds[0].rows and len(seeds[0].rows) == 2
    }
    assert halves == (("c9 1", "", ""), ("c9 3", "", ""))


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
    monkeypatch.setattr(keeping, "HERE", str(work.parent))
    keeping.pack(out, tmp_path / "runs.tar.xz")
    keeping.unpack(tmp_path / "runs.tar.xz", tmp_path / "again" / "study")
    again = collect_comparison(tmp_path / "again" / "study")
    assert json.dumps(again["entries"]) == json.dumps(found["entries"])
    assert collect_comparison(tmp_path / "again" / "study", samples=2)["examples"] == {}  # no answers are packed

    path = out / "runs" / "k2" / "seed-1" / "floor" / "bank.json"
    path.unlink()  # without all choices nothing is known of what the entry's silos keep
    left = {e["name"]: e for e in collect_comparison(out)["entries"]}["k2"]
    assert left["own_state"] == "personalized"
