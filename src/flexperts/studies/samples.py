"""Answers of several models to the same rows, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexperts.studies.finished import Finished

_ROWS, _ENTRIES, _LONGEST = 3, 4, 1500


def examples(reference: Finished, finished: Sequence[Finished]) -> dict[str, list[dict[str, Any]]]:
    """Return the first rows of every client with the answers of the base, the reference and the next entries.

    All are of the first seed that these entries have in common. Long texts are cut.
    """
    shown = [reference, *(f for f in finished if f is not reference and f.method != "zero_shot")][:_ENTRIES]
    common = set.intersection(*(set(entry.runs) for entry in shown))
    if not common:
        return {}
    seed = min(common)
    return {
        client: [_example(shown, seed, client, row) for row in _rows(reference, seed, client)]
        for client in reference.clients
    }


def _rows(entry: Finished, seed: int, client: str) -> range:
    return range(min(_ROWS, len(entry.runs[seed].of_client("predictions", client))))


def _example(shown: Sequence[Finished], seed: int, client: str, row: int) -> dict[str, Any]:
    answers: dict[str, str] = {}
    line: dict[str, Any] = {}
    for entry in reversed(shown):  # the reference comes last, so that rows and base answers are its own
        line = entry.runs[seed].of_client("predictions", client)[row]
    for entry in shown:
        own = entry.runs[seed].of_client("predictions", client)[row]
        answers |= {_label(entry.name, state): _cut(own[state]) for state in entry.states if state in own}
    return {key: _cut(line[key]) for key in ("instruction", "context", "response")} | {"answers": answers}


def _label(entry: str, state: str) -> str:
    return "zero-shot" if state == "zero_shot" else f"{entry} {state}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
