"""Answers of several models to the same rows, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexperts.studies.finished import Finished

_ENTRIES, _LONGEST = 4, 1500


def examples(reference: Finished, finished: Sequence[Finished], count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the first rows of every client with the answers of the base, the reference and the next entries.

    All are of the first seed that these entries have in common. Long texts are cut.

    Args:
        reference, finished: As for ``collect``.
        count: Rows of each client; with 0, no row's text is read.
    """
    if not count:
        return {}
    shown = [reference, *(f for f in finished if f is not reference and f.method != "zero_shot")][:_ENTRIES]
    common = set.intersection(*(set(entry.runs) for entry in shown))
    if not common:
        return {}
    found = {client: _examples(shown, min(common), client, count) for client in reference.clients}
    return {client: rows for client, rows in found.items() if rows}


def _examples(shown: Sequence[Finished], seed: int, client: str, count: int) -> list[dict[str, Any]]:
    kept = {entry.name: entry.predictions[seed][client] for entry in shown}
    if any(some is None for some in kept.values()):
        return []  # a deployed run's answers are at its silos
    lines = {name: some[:count] for name, some in kept.items()}
    rows = lines[shown[0].name]
    return [
        {key: _cut(row[key]) for key in ("instruction", "context", "response")}
        | {"answers": _answers(shown, {name: some[number] for name, some in lines.items()})}
        for number, row in enumerate(rows)
    ]


def _answers(shown: Sequence[Finished], lines: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the answers to one row, by entry and state; the untouched base's is one for all."""
    return {_label(e.name, state): _cut(lines[e.name][state]) for e in shown for state in e.states}


def _label(entry: str, state: str) -> str:
    return "zero-shot" if state == "zero_shot" else f"{entry} {state}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
