"""The tables of what fits a card are what the planner says."""

from __future__ import annotations

import pytest

from .scripts import script


@pytest.mark.slow
def test_the_tables_are_current() -> None:
    made = script("dev/card_table.py")
    page = made.PAGE.read_text(encoding="utf-8")
    assert f"{made.START}{made.text()}{made.END}" in page, "run `python dev/card_table.py`"
