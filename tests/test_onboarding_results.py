"""The page on onboarding shows the committed numbers, and these are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .scripts import script

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results" / "onboarding"


def test_the_page_shows_the_committed_results() -> None:
    benchmark, page = script("benchmarks/onboarding.py"), (FOLDER / "README.md").read_text(encoding="utf-8")
    entries = json.loads((FOLDER / "onboarding.json").read_text(encoding="utf-8"))["entries"]
    assert entries
    for made in (benchmark.level_table, benchmark.table, benchmark.untrained_table):
        assert made(entries) in page


def test_cells_are_one_of_each_kind_and_tell_no_path() -> None:
    text = (FOLDER / "onboarding.json").read_text(encoding="utf-8")
    entries = json.loads(text)["entries"]
    places = [(e["seed"], e["silo"], e["rows"]) for e in entries]
    assert len(set(places)) == len(places)
    assert {e["steps"] for e in entries} == {48}
    for entry in entries:
        untouched = [entry[who]["nll"]["zero_shot"] for who in ("joined", "alone", "participant")]
        assert untouched == pytest.approx(untouched[:1] * 3, rel=1e-4)
    assert not re.search(r'": "/', text)
