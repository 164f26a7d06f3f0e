"""The tables of a comparison, for the HTML page, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from flexperts.config.changes import flat
from flexperts.reports.cells import MISSING, Cell, Column, Table, finite, number, significant, size, words
from flexperts.reports.notes import counts, with_budgets
from flexperts.reports.reading import Comparison, Entry, each_of, layer_names, ordered, routing_measure, routing_of
from flexperts.reports.score_tables import (
    WHO,
    ability_table,
    answer_table,
    floor_table,
    main_table,
    reward_table,
    trained,
)
from flexperts.reports.silo_tables import client_table, newcomer_table, robust_table, rounds_table, spread_table


def tables(comparison: Comparison) -> dict[str, Table]:
    """Return every table that has a row, by key, in the order of the report.

    Keys: main, rewards, clients-rouge_l, clients-nll, clients-reward_accuracy, robust, spread, rounds_trained,
    newcomers, answers, floor, ability, cost, groups, privacy, routing, selection, entries, environment.
    Columns in which every number is missing are left out. Below every table of entries are the budgets and variants
    of its entries' methods.
    """
    made = (
        main_table(comparison),
        rewards := reward_table(comparison),
        client_table(comparison, "rouge_l"),
        client_table(comparison, "nll"),
        *([client_table(comparison, "reward_accuracy")] if rewards.rows else []),
        robust_table(comparison),
        spread_table(comparison),
        rounds_table(comparison),
        newcomer_table(comparison),
        answer_table(comparison),
        floor_table(comparison),
        ability_table(comparison),
        cost_table(comparison),
        groups_table(comparison),
        privacy_table(comparison),
        routing_table(comparison),
        selection_table(comparison),
        entries_table(comparison),
        environment_table(comparison),
    )
    shown = (with_budgets(table.without_empty_columns(), comparison) for table in made if table.rows)
    return {table.key: table for table in shown if len(table.header) > 1}


_DIRECTIONS = {"uplink": "sent", "downlink": "received"}


def cost_table(comparison: Comparison) -> Table:
    """Return bytes, trained parameters, memory and seconds of every entry."""
    run, one = "whole run, all clients", "one client, trained"
    header = (
        Column("entry", words=True),
        *(Column(name, each_of(comparison)) for name in _DIRECTIONS.values()),
        *(Column(name, run) for name in _DIRECTIONS.values()),
        Column("personal bytes sent", run),
        *(Column(f"{name} parameters", one) for name in ("shared", "personal")),
        Column("peak memory"),
        *(Column(name, "time, s") for name in ("training", "evaluation", "total")),
    )
    note = (
        "Bytes as encoded on the wire, powers of 1,000. Personal bytes sent are counted by searching every message "
        "for personal tensors. Peak memory is that of the process, with what earlier runs left in it; flexperts "
        "plan estimates what a method needs. Seconds are means over seeds, on the machine below. "
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
        f"Payload {each_of(comparison)}, without the encoding's own bytes; – is a group that the entry does not "
        "send."
    )
    return Table("groups", "Bytes by tensor group", note, header, rows)


def privacy_table(comparison: Comparison) -> Table:
    """Return the guarantees of differential privacy, for entries that add noise."""
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


MEASURES = {
    "entropy": "entropy",
    "load_entropy": "evenness of load",
    "agreement": "agreement with base",
    "divergence": "divergence from base",
    "dead": "dead experts",
    "opening": "gate opening",
}
"""A layer's number in ``comparison.json`` -> its name in reports."""


def routing_table(comparison: Comparison) -> Table:
    """Return the routing of every entry's trained state as means over clients and layers."""
    header = (*WHO, *map(Column, MEASURES.values()))
    rows = tuple(
        (words(entry["name"]), trained(entry), *(_mean(clients, key) for key in MEASURES))
        for entry in ordered(comparison)
        if (clients := routing_of(entry))
    )
    note = (
        "Means over clients and layers, on the clients' own rows after the last round, first seed. Entropy of the "
        "router's distribution and divergence (Jensen-Shannon) in nats; evenness is the load's entropy, 1 is even. "
        "Agreement and divergence compare with the untouched base on the same tokens; dead experts get no token."
    )
    return Table("routing", "Routing", note, header, rows)


def selection_table(comparison: Comparison) -> Table:
    """Return the experts that each client chose in each layer, and their losses compared with all experts'."""
    entry = selected(comparison)
    header = (
        Column("client", words=True),
        Column("layer", words=True),
        Column("chosen", words=True),
        *(Column(name, "relative reconstruction loss") for name in ("chosen", "best", "median", "worst")),
    )
    rows = tuple(
        (words(client), words(short), *_selection(layers[module]))
        for client, layers in ((entry or {}).get("selection") or {}).items()
        for module, short in layer_names(layers).items()
    )
    note = (
        f"{entry['name'] if entry else ''}, first seed. The loss of an expert is how badly it alone replaces the "
        "whole layer on the client's own tokens: 0 is perfect, 1 as bad as no output. For several, the mean."
    )
    return Table("selection", "Selection of experts", note, header, rows)


def selected(comparison: Comparison) -> Entry | None:
    """Return the entry whose selection is shown: the reference, or the first entry with a selection."""
    having = [entry for entry in comparison["entries"] if entry.get("selection")]
    return next((e for e in having if e["name"] == comparison["reference"]), having[0] if having else None)


def _mean(clients: Mapping[str, Mapping[str, Mapping[str, Any]]], key: str) -> Cell:
    found = [routing_measure(layer, key) for layers in clients.values() for layer in layers.values()]
    present = [value for value in found if value is not None]
    average = fmean(present) if present else None
    return significant(average) if key == "divergence" else number(average, 1 if key == "dead" else 3)


def _selection(layer: Mapping[str, Any]) -> tuple[Cell, ...]:
    losses = [value for value in map(finite, layer.get("loss") or []) if value is not None]
    chosen = [finite(layer["loss"][i]) for i in layer["choice"] if i < len(layer.get("loss") or [])]
    present = [value for value in chosen if value is not None]
    numbers = (fmean(present) if present else None, *(f(losses) if losses else None for f in (min, median, max)))
    return words(", ".join(map(str, layer["choice"]))), *(number(value, 3) for value in numbers)


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
    """Return versions, code and machine, one fact per row."""
    facts = flat(comparison.get("environment") or {})
    mixed = any(isinstance(value, list) for value in facts.values())
    note = "Where there are several values, the runs differ." if mixed else ""
    header = (Column("what", words=True), Column("value", words=True))
    rows = tuple((words(name), words(_text(value))) for name, value in facts.items())
    return Table("environment", "Environment", note, header, rows)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(_text, value))
    return MISSING if value is None else str(value)
