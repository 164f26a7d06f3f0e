"""Tables of what was run: each entry's settings, and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexperts.reports.cells import Cell, Column, Table, words
from flexperts.reports.reading import Comparison, ordered


def entries_table(comparison: Comparison) -> Table:
    """Return method, changed settings and finished seeds of every entry."""
    names = ("entry", "method", "settings that differ from the recipe", "seeds")
    rows = tuple(
        (
            words(e["name"]),
            words(e["method"]),
            words(" ".join(e.get("settings") or []) or "none"),
            words(", ".join(map(str, e["seeds"]))),
        )
        for e in ordered(comparison)
    )
    return Table("entries", "Entries", "", tuple(Column(name, words=True) for name in names), rows)


def environment_table(comparison: Comparison) -> Table:
    """Return versions and machine, one fact a row."""
    rows = tuple(_facts(comparison.get("environment") or {}))
    header = (Column("what", words=True), Column("value", words=True))
    return Table("environment", "Environment", "", header, rows)


def _facts(found: Mapping[str, Any]) -> list[tuple[Cell, Cell]]:
    facts = []
    for name, value in found.items():
        facts += (
            _facts(value) if isinstance(value, Mapping) else [(words(name), words("–" if value is None else value))]
        )
    return facts
