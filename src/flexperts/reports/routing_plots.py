"""Heat maps of routing: the experts that each client's tokens use, and how far the graft gates open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flexperts.reports.cells import finite
from flexperts.reports.figures import INK, canvas, drawing, heat, shortened, svg
from flexperts.reports.plots import NARROW, WIDTH, Plot
from flexperts.reports.reading import Comparison, Entry, layer_names, routing_measure, routing_of


@dataclass(frozen=True)
class RoutingPlots:
    """The plots of an entry's routing.

    Args:
        entry: The entry's name.
        use: A map of expert use per client (layers by experts), and last the colour scale; may be empty.
        opening: How far the gates of the personal experts open, layers by clients; None if there are none.
    """

    entry: str
    use: list[Plot]
    opening: Plot | None


def routing_plots(comparison: Comparison) -> list[RoutingPlots]:
    """Return the plots of every entry that recorded the routing of its own state, all maps on one colour scale."""
    maps = {entry["name"]: _maps(entry) for entry in comparison["entries"]}
    top = max((float(np.nanmax(v)) for clients in maps.values() for _, v in clients.values()), default=0.0) or 1.0
    made = [
        RoutingPlots(e["name"], _use_plots(f"routing-{i}", maps[e["name"]], top), _opening_plot(f"opening-{i}", e))
        for i, e in enumerate(comparison["entries"])
    ]
    return [plots for plots in made if plots.use or plots.opening]


_Map = tuple[list[str], Any]
"""Layers' short names, and shares ``[layers, experts]``."""


def _maps(entry: Entry) -> dict[str, _Map]:
    """Return the clients' maps that contain a number."""
    maps = {client: _use(layers) for client, layers in routing_of(entry).items()}
    return {client: found for client, found in maps.items() if np.isfinite(found[1]).any()}


def _use_plots(key: str, maps: Mapping[str, _Map], top: float) -> list[Plot]:
    drawn = [_map(f"{key}-{i}", client, *found, top) for i, (client, found) in enumerate(maps.items())]
    return [*drawn, _scale(f"{key}-scale", top)] if drawn else []


def _opening_plot(key: str, entry: Entry) -> Plot | None:
    clients = routing_of(entry)
    names = layer_names(module for layers in clients.values() for module in layers)
    rows = [[routing_measure(layers.get(m, {}), "opening") for layers in clients.values()] for m in names]
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
        return Plot("Gate opening", svg(figure, key, "gate opening by layer and client"))


def _use(layers: Mapping[str, Mapping[str, Any]]) -> _Map:
    """Return a client's map; layers with fewer experts are filled up with NaN."""
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


def _scale(key: str, top: float) -> Plot:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    with drawing():
        figure = Figure(figsize=(NARROW / 72, 44 / 72), layout="constrained")
        colours = ScalarMappable(Normalize(0, top), cmap="cividis")
        bar = figure.colorbar(colours, cax=figure.add_subplot(), orientation="horizontal")
        bar.outline.set_visible(False)
        return Plot("Share of selections", svg(figure, key, f"colours from 0 to {top:.3g}"))


def _write(axes: Any, values: Any, top: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "#ffffff" if value < 0.55 * top else "#000000"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=10)
    axes.tick_params(axis="both", labelcolor=INK)
