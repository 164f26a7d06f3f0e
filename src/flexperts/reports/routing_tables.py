"""Tables of routing: how tokens move through the experts, and which expert each client grafted."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from flexperts.reports.cells import Cell, Column, Table, finite, number, significant, words
from flexperts.reports.reading import Comparison, Entry, layer_names, measure, ordered, routing_of
from flexperts.reports.score_tables import WHO, own_state

MEASURES = {
    "entropy": "entropy",
    "load_entropy": "evenness of load",
    "agreement": "agreement with base",
    "divergence": "divergence from base",
    "dead": "dead experts",
    "opening": "gate opening",
}
"""A layer's number in ``comparison.json`` -> in words."""


def routing_table(comparison: Comparison) -> Table:
    """Return means over clients and layers of the routing of every entry's own state."""
    header = (*WHO, *map(Column, MEASURES.values()))
    rows = tuple(
        (words(entry["name"]), own_state(entry), *(_mean(clients, key) for key in MEASURES))
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
    """Return which experts each client chose in each layer, and how good the choice was among all experts."""
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
        "whole layer on the client's own tokens: 0 is perfect, 1 as bad as no output. Of several chosen, the mean."
    )
    return Table("selection", "Selection of experts", note, header, rows)


def selected(comparison: Comparison) -> Entry | None:
    """Return the entry whose selection is shown: the reference, or the first that has one."""
    having = [entry for entry in comparison["entries"] if entry.get("selection")]
    return next((e for e in having if e["name"] == comparison["reference"]), having[0] if having else None)


def _mean(clients: Mapping[str, Mapping[str, Mapping[str, Any]]], key: str) -> Cell:
    found = [measure(layer, key) for layers in clients.values() for layer in layers.values()]
    present = [value for value in found if value is not None]
    average = fmean(present) if present else None
    return significant(average) if key == "divergence" else number(average, 1 if key == "dead" else 3)


def _selection(layer: Mapping[str, Any]) -> tuple[Cell, ...]:
    losses = [value for value in map(finite, layer.get("loss") or []) if value is not None]
    chosen = [finite(layer["loss"][i]) for i in layer["choice"] if i < len(layer.get("loss") or [])]
    present = [value for value in chosen if value is not None]
    numbers = (fmean(present) if present else None, *(f(losses) if losses else None for f in (min, median, max)))
    return words(", ".join(map(str, layer["choice"]))), *(number(value, 3) for value in numbers)
