"""Plots over rounds: learning curves with bands over seeds, and drift of the routing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flexperts.reports.cells import finite
from flexperts.reports.figures import GRID, MUTED, canvas, drawing, looks, shortened, svg
from flexperts.reports.plots import NARROW, WIDTH, Plot
from flexperts.reports.reading import METRICS, Comparison, Entry, ordered, trained_state
from flexperts.reports.tables import MEASURES

TOGETHER = 6
"""Most entries in one plot; if there are more, every entry has a small plot with the others in grey."""
TRAINING = "training"
"""Name of the training loss, used like the name of a metric."""
CURVES = METRICS | {TRAINING: "Training loss"}


def curve_plots(comparison: Comparison, metric: str) -> list[Plot]:
    """Return curves of the trained state, or of the training loss, with mean and range over seeds.

    Up to ``TOGETHER`` entries share one plot; more entries have one small plot each.
    """
    entries = [e for e in ordered(comparison) if _rounds(_curve(e, trained_state(e), metric)) > 1]
    if not entries:
        return []
    if len(entries) <= TOGETHER:
        return [_one_plot(comparison, entries, metric)]
    return [_small_plot(comparison, entries, entry, metric) for entry in entries]


def drift_plots(comparison: Comparison) -> list[Plot]:
    """Return one plot per measure of the routing over rounds, with a line per entry."""
    entries = [e for e in ordered(comparison) if e.get("routing_rounds")]
    drawn = (_drift_plot(comparison, entries, measure) for measure in MEASURES)
    return [plot for plot in drawn if plot is not None]


def _one_plot(comparison: Comparison, entries: list[Entry], metric: str) -> Plot:
    title = f"{CURVES[metric]} over rounds"
    with drawing():
        figure, axes = canvas(WIDTH, 260)
        for entry in entries:
            _line(axes, comparison, entry, metric)
        _over_rounds(axes)
        return Plot(title, svg(figure, f"curve-{metric}", title))


def _small_plot(comparison: Comparison, entries: list[Entry], entry: Entry, metric: str) -> Plot:
    label = f"{CURVES[metric]} over rounds: {entry['name']}"
    with drawing():
        figure, axes = canvas(NARROW, 140)
        for other in entries:
            curve = _curve(other, trained_state(other), metric)
            axes.plot(curve["rounds"], _values(curve["mean"]), color=GRID, linewidth=1)
        _line(axes, comparison, entry, metric)
        _over_rounds(axes)
        axes.set_xlabel("")
        key = f"curve-{metric}-{entries.index(entry)}"
        return Plot(shortened(entry["name"], 34), svg(figure, key, label))


def _line(axes: Axes, comparison: Comparison, entry: Entry, metric: str) -> None:
    """Draw the trained state with its band, and the global state dashed if it is a different state."""
    look = looks(comparison)[entry["name"]]
    curve = _curve(entry, trained_state(entry), metric)
    if len(entry["seeds"]) > 1:
        low, high = _values(curve["low"]), _values(curve["high"])
        axes.fill_between(curve["rounds"], low, high, color=look.colour, alpha=0.22, linewidth=0)
    shared = _curve(entry, "global", metric)
    if metric != TRAINING and trained_state(entry) != "global" and _rounds(shared) > 1:
        axes.plot(
            shared["rounds"], _values(shared["mean"]), color=look.colour, linewidth=1.2, linestyle=(0, (4, 2))
        )
    axes.plot(curve["rounds"], _values(curve["mean"]), color=look.colour, marker=look.marker)


def _drift_plot(comparison: Comparison, entries: list[Entry], measure: str) -> Plot | None:
    having = [e for e in entries if np.isfinite(_values(e["routing_rounds"].get(measure) or [])).sum() > 1]
    if not having:
        return None
    title = MEASURES[measure][0].upper() + MEASURES[measure][1:]
    with drawing():
        figure, axes = canvas(300, 190)
        for entry in having:
            look, drift = looks(comparison)[entry["name"]], entry["routing_rounds"]
            axes.plot(
                drift["rounds"], _values(drift[measure]), color=look.colour, marker=look.marker, linewidth=1.3
            )
        _over_rounds(axes)
        return Plot(title, svg(figure, f"drift-{measure}", f"{title} over rounds"))


def _over_rounds(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("round", color=MUTED)
    axes.grid(axis="y", alpha=0.6)


def _curve(entry: Entry, state: str, metric: str) -> Mapping[str, Any]:
    where = (TRAINING, "nll") if metric == TRAINING else (state, metric)
    return ((entry.get("curves") or {}).get(where[0]) or {}).get(where[1]) or {}


def _rounds(curve: Mapping[str, Any]) -> int:
    return int(np.isfinite(_values(curve.get("mean") or [])).sum())


def _values(values: Any) -> Any:
    """Return numbers as an array, with NaN for missing ones."""
    return np.array([np.nan if finite(v) is None else finite(v) for v in values], dtype=float)
