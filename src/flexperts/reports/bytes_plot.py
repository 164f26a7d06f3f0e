"""The plot of quality against bytes: one labelled dot per entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor, log10

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexperts.reports.cells import finite, size
from flexperts.reports.figures import MUTED, PAPER, canvas, drawing, looks, shortened, svg
from flexperts.reports.plots import WIDTH, Plot
from flexperts.reports.reading import METRICS, Comparison, Entry, each_of, mean, ordered, own

_LETTER, _LINE, _GAP = 5.8, 11, 9
"""Width of a letter, height of a line, distance from dot to label, in pixels."""
_LEADER = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}


def bytes_plot(comparison: Comparison, metric: str) -> Plot | None:
    """Return a plot of a score over bytes sent and received per client and round; no traffic is shown at 0."""
    entries = [e for e in ordered(comparison) if None not in (_traffic(e), mean(own(e, "own", metric)))]
    if len(entries) < 2:
        return None
    title = f"{METRICS[metric]} against bytes"
    with drawing():
        figure, axes = canvas(WIDTH, 240 + 5 * len(entries))
        places = _bytes_axis(axes, [_traffic(e) or 0.0 for e in entries])
        scores = [mean(own(e, "own", metric)) or 0.0 for e in entries]
        for entry, x, y in zip(entries, places, scores, strict=True):
            look = looks(comparison)[entry["name"]]
            axes.plot(
                x, y, look.marker, color=look.colour, markeredgecolor=PAPER, markeredgewidth=0.8, markersize=8
            )
        axes.set_xlabel(f"bytes sent and received, {each_of(comparison)}")
        axes.set_ylabel(f"{METRICS[metric]}, {'lower' if metric == 'nll' else 'higher'} is better")
        axes.grid(alpha=0.6)
        axes.margins(x=0.12, y=0.1)
        _labels(axes, places, scores, [shortened(e["name"]) for e in entries])
        return Plot(title, svg(figure, f"bytes-{metric}", title))


def _traffic(entry: Entry) -> float | None:
    sent = entry.get("bytes") or {}
    ways = [finite(sent.get(f"{way}_per_client_per_round")) for way in ("uplink", "downlink")]
    return None if None in ways else sum(way for way in ways if way is not None)


def _bytes_axis(axes: Axes, values: Sequence[float]) -> list[float]:
    """Label a log axis by hand, with a place for 0; return the values' positions on it."""
    positive = [log10(v) for v in values if v > 0] or [0.0]
    low, high = min(positive), max(positive)
    steps = (0.0, log10(3)) if high - low < 1.5 else (0.0,)
    marks = [p + step for p in range(floor(low) - 1, floor(high) + 2) for step in steps]
    marks = [m for m in marks if low - 0.5 <= m <= high + 0.5]
    nothing = min([low, *marks]) - 0.5
    zero = [nothing] if 0 in values else []
    names = [size(10**m).text.replace(".0 ", " ").replace(".00 ", " ") for m in marks]
    axes.set_xticks([*zero, *marks], ["0"] * len(zero) + names)
    return [log10(v) if v > 0 else nothing for v in values]


def _labels(axes: Axes, xs: Sequence[float], ys: Sequence[float], names: Sequence[str]) -> None:
    """Write a name next to every dot; where it would cover a dot or a name, move it and add a line to its dot."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    # The positions are those of this layout, which must not change any more.
    figure.set_layout_engine("none")
    dots = axes.transData.transform(np.column_stack((xs, ys))).tolist()
    taken = [_Box(x - 5, x + 5, y) for x, y in dots]
    for (x, y), name in sorted(zip(dots, names, strict=True), key=lambda item: -item[0][1]):
        tried = list(_places(axes, x, y, _LETTER * len(name)))
        box = next((box for box in tried if not any(box.covers(other) for other in taken)), tried[0])
        taken.append(box)
        after = box.left > x
        axes.annotate(
            name,
            (x, y),
            (box.left if after else box.right, box.middle),
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="left" if after else "right",
            va="center",
            fontsize=10,
            arrowprops=_LEADER | {"relpos": (0.0 if after else 1.0, 0.5)} if abs(box.middle - y) > 6 else None,
        )


@dataclass(frozen=True)
class _Box:
    """A line of text: from left to right around a height, in pixels."""

    left: float
    right: float
    middle: float

    def covers(self, other: _Box) -> bool:
        near = abs(self.middle - other.middle) < _LINE
        return near and self.left < other.right and other.left < self.right


def _places(axes: Axes, x: float, y: float, width: float) -> Iterator[_Box]:
    """Yield possible places for a dot's label, the nearest first; all but the first are inside the axes."""
    after = _Box(x + _GAP, x + _GAP + width, y)
    before = _Box(x - _GAP - width, x - _GAP, y)
    sides = (after, before) if x < (axes.bbox.x0 + axes.bbox.x1) / 2 else (before, after)
    yield sides[0]
    for step in sorted(range(-84, 85, 4), key=abs):
        for side in sides:
            box = _Box(side.left, side.right, y + step)
            high = axes.bbox.y0 + 7 <= box.middle <= axes.bbox.y1
            if high and axes.bbox.x0 <= box.left and box.right <= axes.bbox.x1 + 12:
                yield box
