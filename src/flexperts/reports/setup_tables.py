"""Tables of what was run: each entry's settings, and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    facts = _flat(comparison.get("environment") or {})
    mixed = any(isinstance(value, list) for value in facts.values())
    note = "Where several values stand, the runs differ." if mixed else ""
    header = (Column("what", words=True), Column("value", words=True))
    rows = tuple((words(name), words(_text(value))) for name, value in facts.items())
    return Table("environment", "Environment", note, header, rows)


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in found.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(_text, value))
    return MISSING if value is None else str(value)
