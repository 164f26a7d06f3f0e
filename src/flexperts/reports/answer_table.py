"""The table of answers that were cut at the limit, and of references that are longer than it."""

from __future__ import annotations

from typing import Any

from flexperts.reports.cells import MISSING, Cell, Column, Table, words
from flexperts.reports.notes import counts
from flexperts.reports.reading import STATES, Comparison, Entry, ordered, own_state_words
from flexperts.reports.score_tables import WHO, own_state


def answer_table(comparison: Comparison) -> Table:
    """Return how many answers reached the limit, by state, and by client in the own state; no rows without any."""
    clients = comparison["clients"]
    counted = [entry for entry in ordered(comparison) if entry.get("answers")]
    is_shown = any(_total(e, "longer_references") or _total(e, "cut", e["own_state"]) for e in counted)
    header = (
        *WHO,
        Column("limit, tokens"),
        Column("longer references"),
        *(Column(name, "cut, all clients") for name in STATES.values()),
        *(Column(client, f"cut, {own_state_words(comparison)}") for client in clients),
    )
    note = (
        "An answer is cut where it reaches evaluation.max_new_tokens before it ends; a longer reference cannot be "
        f"given whole, which costs points of ROUGE-L. Numbers are of all seeds. {counts(comparison)}"
    )
    rows = tuple(_row(entry, clients) for entry in counted) if is_shown else ()
    return Table("answers", "Answers that were cut", note, header, rows)


def _row(entry: Entry, clients: Any) -> tuple[Cell, ...]:
    answers = entry["answers"]
    by_client, rows = answers["clients"], _total(entry, "rows")
    cut = (_share(_total(entry, "cut", state) if state in entry["scores"] else None, rows) for state in STATES)
    own = (by_client.get(client) for client in clients)
    return (
        words(entry["name"]),
        own_state(entry),
        Cell(", ".join(map(str, answers["max_new_tokens"]))),
        _share(_total(entry, "longer_references"), rows),
        *cut,
        *(_share(its["cut"][entry["own_state"]], its["rows"]) if its else _share(None, 0) for its in own),
    )


def _total(entry: Entry, key: str, state: str | None = None) -> int:
    clients = entry["answers"]["clients"].values()
    return int(sum(client[key] if state is None else client[key][state] for client in clients))


def _share(count: int | None, rows: int) -> Cell:
    return Cell(MISSING) if count is None else Cell(f"{count} of {rows}", float(count))
