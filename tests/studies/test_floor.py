"""What a floor brought, from records made by hand: share harmed, worst tenth, regret, and their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.artifacts import RunDirectory
from flexperts.files import sealed, write_json
from flexperts.reports.tables import tables
from flexperts.studies.finished import Finished
from flexperts.studies.floor import floors, harmed
from flexperts.studies.statistics import Paired, paired_bootstrap, worst_tenth

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
