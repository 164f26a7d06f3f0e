"""Tables of what an entry costs: bytes, parameters, memory, seconds."""

from __future__ import annotations

from typing import Any

from flexperts.reports.cells import Cell, Column, Table, number, size, words
from flexperts.reports.notes import counts
from flexperts.reports.reading import Comparison, Entry, ordered

_DIRECTIONS = {"uplink": "sent", "downlink": "received"}


def cost_table(comparison: Comparison) -> Table:
    """Return bytes, trained parameters, memory and seconds of every entry."""
    run, one = "whole run, all clients", "one client, trained"
    header = (
        Column("entry", words=True),
        *(Column(name, "per client and round") for name in _DIRECTIONS.values()),
        *(Column(name, run) for name in _DIRECTIONS.values()),
        Column("personal bytes sent", run),
        *(Column(f"{name} parameters", one) for name in ("shared", "personal")),
        Column("peak memory"),
        *(Column(name, "time, s") for name in ("training", "evaluation", "total")),
    )
    note = (
        "Bytes as encoded on the wire, powers of 1,000. Personal bytes sent are counted by searching every message "
        "for personal tensors. Peak memory is the process's, leftovers of earlier runs included: what a method "
        "needs is planned by flexperts plan. Seconds are means over seeds, on the machine below. "
    )
    rows = tuple(_cost_row(entry) for entry in ordered(comparison))
    return Table("cost", "Bytes, parameters, memory, time", note + counts(comparison), header, rows)


def groups_table(comparison: Comparison) -> Table:
    """Return payload bytes per client and round by tensor group, in both directions."""
    columns = [(way, group) for way in _DIRECTIONS for group in _groups(comparison, way)]
    header = (Column("entry", words=True), *(Column(group, _DIRECTIONS[way]) for way, group in columns))
    rows = tuple(
        (words(e["name"]), *(_group(e, *c) for c in columns)) for e in ordered(comparison) if _has_groups(e)
    )
    note = (
        "Payload per client and round, without the encoding's own bytes; – is a group that the entry does not send."
    )
    return Table("groups", "Bytes by tensor group", note, header, rows)


def privacy_table(comparison: Comparison) -> Table:
    """Return what differential privacy guarantees, for the entries that add noise."""
    numbers = ("clip", "noise_multiplier", "delta", "epsilon")
    noisy = [entry for entry in ordered(comparison) if entry.get("privacy")]
    rows = tuple(
        (
            words(entry["name"]),
            words(entry["privacy"]["mode"]),
            *(Cell(f"{entry['privacy'][name]:.4g}", entry["privacy"][name]) for name in numbers),
        )
        for entry in noisy
    )
    names = (Column("entry", words=True), Column("noise", words=True), Column("clip", "L2 norm"))
    header = (*names, Column("noise multiplier"), Column("delta"), Column("epsilon", "all rounds"))
    note = (
        "Of the shared updates, per client; losses, scores and counts that silos send are not covered. Central: "
        "with or without one client. Local: any update of a client against any other."
    )
    return Table("privacy", "Differential privacy", note, header, rows)


def _cost_row(entry: Entry) -> tuple[Cell, ...]:
    sent, trained, seconds = (entry.get(key) or {} for key in ("bytes", "parameters", "seconds"))
    each = (size(sent.get(f"{way}_per_client_per_round")) for way in _DIRECTIONS)
    return (
        words(entry["name"]),
        *each,
        *(size(sent.get(f"{way}_total")) for way in _DIRECTIONS),
        number(sent.get("personal_sent"), 0),
        *(number(trained.get(key), 0) for key in ("shared", "personal")),
        size(entry.get("peak_memory")),
        *(number(seconds.get(key), 0) for key in ("training", "evaluation", "total")),
    )


def _sizes(entry: Entry, way: str) -> dict[str, Any]:
    return ((entry.get("bytes") or {}).get("groups") or {}).get(way) or {}


def _group(entry: Entry, way: str, group: str) -> Cell:
    return size(_sizes(entry, way).get(group))


def _has_groups(entry: Entry) -> bool:
    return any(_sizes(entry, way) for way in _DIRECTIONS)


def _groups(comparison: Comparison, way: str) -> list[str]:
    return list(dict.fromkeys(group for entry in comparison["entries"] for group in _sizes(entry, way)))
