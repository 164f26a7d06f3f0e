"""The report's files, and its HTML page: without scripts and external files; it opens from disk and on phones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from flexperts.files import PRIVATE, PUBLIC, write_json, write_text
from flexperts.reports.bytes_plot import bytes_plot
from flexperts.reports.cells import Table
from flexperts.reports.curve_plots import CURVES, curve_plots, drift_plots
from flexperts.reports.figures import looks
from flexperts.reports.markdown import markdown_report
from flexperts.reports.plots import Plot, difference_plot, score_plot
from flexperts.reports.reading import METRICS, Comparison, ordered, rows_shown
from flexperts.reports.routing_plots import routing_plots
from flexperts.reports.summary import facts, summary
from flexperts.reports.tables import tables


def html_report(comparison: Mapping[str, Any]) -> str:
    """Return the page; the same comparison gives the same bytes.

    Empty sections are left out, also in the table of contents.

    Args:
        comparison: The content of ``comparison.json``.
    """
    made = tables(comparison)
    return template("page.html.jinja").render(
        comparison=comparison,
        warning=rows_shown(comparison),
        summary=summary(comparison),
        facts=facts(comparison),
        legend=[(entry["name"], looks(comparison)[entry["name"]]) for entry in ordered(comparison)],
        tables=made,
        plots=_plots(comparison),
        routing=routing_plots(comparison),
        heads=heads,
        safe_svg=_safe_svg,
    )


def template(name: str) -> Template:
    """Return a page's template."""
    environment = Environment(
        loader=PackageLoader("flexperts.reports", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(name)


def _plots(comparison: Comparison) -> dict[str, list[Plot]]:
    """Return every section's plots, without missing ones."""
    curves = {metric: curve_plots(comparison, metric) for metric in CURVES}
    made: dict[str, list[Plot | None]] = {
        "comparison": [p for m in METRICS for p in (score_plot(comparison, m), difference_plot(comparison, m))],
        "bytes": [bytes_plot(comparison, metric) for metric in METRICS],
        "curves": [plots[0] for plots in curves.values() if len(plots) == 1],
        **{f"curves-{metric}": [*plots] if len(plots) > 1 else [] for metric, plots in curves.items()},
        "drift": [*drift_plots(comparison)],
    }
    return {key: [plot for plot in plots if plot is not None] for key, plots in made.items()}


def heads(table: Table) -> list[tuple[str, int]]:
    """Return the headings that span columns, as text and number of columns; empty if no column has one."""
    spans: list[tuple[str, int]] = []
    for column in table.header:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + 1)
        else:
            spans.append((column.group, 1))
    return spans if any(text for text, _ in spans) else []


def _safe_svg(plot: Plot) -> Markup:
    """Return an SVG as markup; matplotlib has escaped every text in it."""
    return Markup(plot.svg)


def write_reports(comparison: Comparison, out: Path) -> None:
    """Write comparison.json, report.html (opens from disk) and report.md; with rows in them, for this user only."""
    mode = PRIVATE if rows_shown(comparison) else PUBLIC
    write_json(out / "comparison.json", comparison, indent=None, mode=mode)
    write_text(out / "report.html", html_report(comparison), mode=mode)
    write_text(out / "report.md", markdown_report(comparison), mode=mode)
