"""Plots of scores: mean and spread of every entry, and differences to the reference with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from flexperts.reports.cells import finite
from flexperts.reports.figures import INK, MUTED, PAPER, canvas, drawing, looks, shortened, svg
from flexperts.reports.reading import METRICS, Comparison, Entry, against, mean, ordered, own, verdict

WIDTH, NARROW = 400, 210
"""Widths of single plots and of plots side by side, in points."""
_ROW = 19


@dataclass(frozen=True)
class Plot:
    """A drawn plot.

    Args:
        title: Heading over it.
        svg: The element.
    """

    title: str
    svg: str


def score_plot(comparison: Comparison, metric: str) -> Plot | None:
    """Return mean ± std over seeds of every entry's own state on own rows, best ROUGE-L on top."""
    entries = [e for e in ordered(comparison) if mean(own(e, "own", metric)) is not None]
    if len(entries) < 2:
        return None
    title = f"{METRICS[metric]}, own {comparison['split']} rows"
    with drawing():
        figure, axes = canvas(WIDTH, 64 + _ROW * len(entries))
        _names(axes, entries)
        for row, entry in enumerate(entries):
            found = own(entry, "own", metric) or {}
            middle, std = mean(found) or 0.0, finite(found.get("std")) or 0.0
            _whisker(axes, comparison, entry, row, (middle - std, middle, middle + std), filled=True)
            if entry["name"] == comparison["reference"]:
                axes.axvline(middle, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        axes.set_xlabel(_better(metric))
        return Plot(title, svg(figure, f"score-{metric}", title))


def difference_plot(comparison: Comparison, metric: str) -> Plot | None:
    """Return differences to the reference with intervals; marks are hollow if a difference is not significant."""
    compared = {e["name"] for e in comparison["entries"] if verdict(comparison, e, metric) != "none"}
    if not compared:
        return None
    entries = [e for e in ordered(comparison) if e["name"] in compared | {comparison["reference"]}]
    title = f"{METRICS[metric]}, difference to {comparison['reference']}"
    with drawing():
        figure, axes = canvas(WIDTH, 64 + _ROW * len(entries))
        _names(axes, entries)
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        for row, entry in enumerate(entries):
            test = against(entry, metric) or {"low": 0.0, "difference": 0.0, "high": 0.0}
            ends = float(test["low"]), float(test["difference"]), float(test["high"])
            significant = verdict(comparison, entry, metric) != "open"
            _whisker(axes, comparison, entry, row, ends, filled=significant)
        axes.set_xlabel(_better(metric))
        return Plot(title, svg(figure, f"difference-{metric}", title))


def _names(axes: Axes, entries: Sequence[Entry]) -> None:
    axes.set_yticks(range(len(entries)), [shortened(e["name"]) for e in entries], color=INK)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.6)
    axes.set_axisbelow(True)


def _whisker(
    axes: Axes, comparison: Comparison, entry: Entry, row: int, ends: tuple[float, float, float], *, filled: bool
) -> None:
    look = looks(comparison)[entry["name"]]
    low, middle, high = ends
    axes.plot((low, high), (row, row), color=look.colour, linewidth=2, solid_capstyle="round", zorder=2)
    face = look.colour if filled else PAPER
    axes.plot(middle, row, look.marker, color=look.colour, markerfacecolor=face, markersize=7, zorder=3)


def _better(metric: str) -> str:
    left = "NLL in nats per token: further left is better"
    return left if metric == "nll" else "ROUGE-L in points: further right is better"
