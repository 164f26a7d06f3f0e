"""The tables of what fits a card are what the planner says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location("card_table", ROOT / "dev" / "card_table.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert f"{script.START}{script.text()}{script.END}" in page, "run `python dev/card_table.py`"
