"""Tables of what was run: each entry's settings, and the environment."""

from __future__ import annotations

from typing import Any

from flexperts.config.flat import flat
from flexperts.reports.cells import MISSING, Column, Table, words
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
    """Return versions, code and machine, one fact a row."""
    facts = flat(comparison.get("environment") or {})
    mixed = any(isinstance(value, list) for value in facts.values())
    note = "Where several values stand, the runs differ." if mixed else ""
    header = (Column("what", words=True), Column("value", words=True))
    rows = tuple((words(name), words(_text(value))) for name, value in facts.items())
    return Table("environment", "Environment", note, header, rows)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(_text, value))
    return MISSING if value is None else str(value)
