"""A comparison's routing and selection, from what clients noted in their run directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexperts.artifacts import RunDirectory
from flexperts.studies.finished import Finished

_OVER_ROUNDS = ("entropy", "divergence", "agreement", "opening")


def routing_and_selection(entry: Finished) -> dict[str, Any]:
    """Return an entry's ``routing``, ``routing_rounds`` and ``selection``; None where its runs did not note it."""
    clients = entry.clients
    lines = [run.of_client("routing", client) or [] for run in entry.runs.values() for client in clients]
    first = next(iter(entry.runs.values()))
    chosen = {c: found for c in clients if (found := first.of_client("selection", c))}
    return {
        "routing": _last(first, clients) if all(lines) else None,
        "routing_rounds": _over_rounds(lines, entry.states[-1]) if all(lines) else None,
        "selection": {c: _selection(found) for c, found in chosen.items()} or None,
    }


def _last(run: RunDirectory, clients: Sequence[str]) -> dict[str, Any]:
    """Return state -> client -> layer -> numbers, of one run's last round; co-selection stays in its files."""
    routing: dict[str, Any] = {}
    for client in clients:
        lines = run.of_client("routing", client)
        for line in (line for line in lines if line["round"] == lines[-1]["round"]):
            layers = {
                name: {key: value for key, value in layer.items() if key != "co_selection"}
                for name, layer in line["layers"].items()
            }
            routing.setdefault(line["state"], {})[client] = layers
    return routing


def _over_rounds(clients: Sequence[Sequence[Mapping[str, Any]]], own_state: str) -> dict[str, Any]:
    """Return means over seeds, clients, layers, by round; round 0 is the untouched base."""
    layers: dict[int, list[Mapping[str, Any]]] = {}
    for lines in clients:
        for line in lines:
            if line["state"] == "zero_shot" and line["round"] == lines[0]["round"]:
                layers.setdefault(0, []).extend(line["layers"].values())
            if line["state"] == own_state:
                layers.setdefault(line["round"], []).extend(line["layers"].values())
    rounds = sorted(layers)
    return {"rounds": rounds} | {key: [_mean(layers[r], key) for r in rounds] for key in _OVER_ROUNDS}


def _mean(layers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [np.mean(layer[key]) for layer in layers if layer.get(key) is not None]
    return float(np.mean(values)) if values else None


def _selection(found: Mapping[str, Any]) -> dict[str, Any]:
    losses = found["selection"]
    return {layer: {"choice": choice, "loss": losses.get(layer, [])} for layer, choice in found["choice"].items()}
