"""Heat maps of routing: which experts each client's tokens go to, and how far the graft gates open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flexperts.reports.cells import finite
from flexperts.reports.figures import INK, canvas, drawing, heat, shortened, svg
from flexperts.reports.plots import NARROW, WIDTH, Plot
from flexperts.reports.reading import Comparison, Entry, layer_names, measure, routing_of


def shown_entry(comparison: Comparison) -> Entry | None:
    """Return the entry whose routing is drawn: the first that recorded some of its own state."""
    return next((entry for entry in comparison["entries"] if routing_of(entry)), None)


def routing_plots(comparison: Comparison) -> list[Plot]:
    """Return one map of expert use per client (layers by experts, one colour scale), and the scale last."""
    maps = {client: _use(layers) for client, layers in routing_of(shown_entry(comparison) or _NOTHING).items()}
    maps = {client: (names, values) for client, (names, values) in maps.items() if np.isfinite(values).any()}
    if not maps:
        return []
    top = max(float(np.nanmax(values)) for _, values in maps.values()) or 1.0
    drawn = [_map(f"routing-{i}", client, *found, top) for i, (client, found) in enumerate(maps.items())]
    return [*drawn, _scale(top)]


def opening_plot(comparison: Comparison) -> Plot | None:
    """Return how far the gates of the personal experts open, layers by clients, as numbers on colours."""
    clients = routing_of(shown_entry(comparison) or _NOTHING)
    names = layer_names(module for layers in clients.values() for module in layers)
    rows = [[measure(layers.get(m, {}), "opening") for layers in clients.values()] for m in names]
    values = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
    if not np.isfinite(values).any():
        return None
    with drawing():
        figure, axes = canvas(WIDTH, 70 + 20 * min(len(names), 24))
        top = max(1.0, float(np.nanmax(values)))
        image = heat(axes, values, list(names.values()), [shortened(c, 12) for c in clients], top)
        if values.size <= 120:
            _write(axes, values, top)
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).outline.set_visible(False)
        return Plot("Gate opening", svg(figure, "opening", "gate opening by layer and client"))


_NOTHING: Mapping[str, Any] = {"own_state": "", "routing": None}


def _use(layers: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], Any]:
    """Return layers' short names and ``[layers, experts]`` shares; layers of fewer experts end in gaps."""
    names = layer_names(layers)
    rows = [[finite(v) for v in layers[module].get("utilisation") or []] for module in names]
    values = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        values[i, : len(row)] = [np.nan if v is None else v for v in row]
    return list(names.values()), values


def _map(key: str, client: str, names: list[str], values: Any, top: float) -> Plot:
    with drawing():
        figure, axes = canvas(NARROW, 56 + 14 * min(len(names), 24))
        heat(axes, values, names, [str(i) for i in range(values.shape[1])], top)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        return Plot(shortened(client, 34), svg(figure, key, f"use of experts by layer: {client}"))


def _scale(top: float) -> Plot:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    with drawing():
        figure = Figure(figsize=(NARROW / 72, 44 / 72), layout="constrained")
        colours = ScalarMappable(Normalize(0, top), cmap="cividis")
        bar = figure.colorbar(colours, cax=figure.add_subplot(), orientation="horizontal")
        bar.outline.set_visible(False)
        return Plot("Share of selections", svg(figure, "routing-scale", f"colours from 0 to {top:.3g}"))


def _write(axes: Any, values: Any, top: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "#ffffff" if value < 0.55 * top else "#000000"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=10)
    axes.tick_params(axis="both", labelcolor=INK)
