"""Figures as inline SVG: text stays text, neutral colours follow the page's theme, same input gives same bytes.

Sizes are CSS pixels at the figure's natural width. pyplot is not used; matplotlib's settings are restored.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexperts.reports.reading import Comparison

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
"""Placeholders that become CSS variables of the page, so that one SVG is readable in light and in dark mode."""
_THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours for all kinds of colour vision, except those invisible on white or on black."""
_MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Look:
    """An entry's colour and marker in every plot.

    Args:
        colour: Hexadecimal colour.
        marker: matplotlib's marker.
        symbol: The marker as a character, for legends in text.
    """

    colour: str
    marker: str
    symbol: str


def looks(comparison: Comparison) -> dict[str, Look]:
    """Return entry -> look: the reference has the first; after six colours the marker changes."""
    names = [entry["name"] for entry in comparison["entries"]]
    names.sort(key=lambda name: name != comparison["reference"])
    forms = list(_MARKERS.items())
    return {
        name: Look(_COLOURS[i % len(_COLOURS)], *forms[i // len(_COLOURS) % len(forms)])
        for i, name in enumerate(names)
    }


@contextmanager
def drawing() -> Iterator[None]:
    """Use our settings inside the block; ignore warnings on letters that matplotlib's font lacks."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of a size in CSS pixels, and its axes."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure, key: str, label: str) -> str:
    """Return a figure as an SVG element for a page.

    Args:
        figure: The figure, drawn inside ``drawing``.
        key: Name of the figure on its page, which makes ids unique.
        label: Text for screen readers.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Metadata contain URLs; the style would apply to the whole page, which has its own.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    # Numbered ids would repeat in every figure of the page; references use only the salted hashes.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r'(<\w+[^>]*?) id="([^"]*)"', lambda m: m.group() if m.group(2) in used else m.group(1), text)
    width = round(figure.get_figwidth() * 72)
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None
    start = f'<svg {head.group()} style="max-width:{round(1.3 * width)}px" role="img" aria-label="{escape(label)}">'
    text = start + text[text.index(">") + 1 :].strip().replace("xlink:href", "href")
    for stand_in, variable in _THEME.items():
        text = text.replace(stand_in, variable)
    return text


def shortened(text: str, length: int = 24) -> str:
    """Return text on one line of at most ``length`` characters, cut with an ellipsis."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def heat(axes: Axes, values: Any, rows: Sequence[str], columns: Sequence[str], top: float) -> Any:
    """Draw a heat map from 0 to ``top`` with names at both axes; return the image.

    Args:
        axes: The axes.
        values: ``[len(rows), len(columns)]``; NaN is left empty.
        rows: Names from top to bottom.
        columns: Names from left to right.
        top: The value with the lightest colour.
    """
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="none")
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        step = -(-len(names) // 12)
        axis.set_ticks(range(0, len(names), step), list(names)[::step])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image
