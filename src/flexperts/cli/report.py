"""`flexperts report`: a run or a comparison as an HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Samples = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Put N scored rows of every silo, with passages and answers, on the pages and in comparison.json.",
    ),
]


def command(
    path: Annotated[Path, typer.Argument(help="Directory of a run or of a comparison.")], samples: Samples = 0
) -> None:
    """Write comparison.json, report.html (opens from disk) and report.md into a finished directory."""
    from flexperts.terminal.console import console

    check_plots()
    report(console(), _collected(path, samples), path)


_WIDE = 120
"""From so many columns on, the terminal table shows more than the scores on each client's own rows."""


def check_plots() -> None:
    """Refuse a report that could not draw its plots, before anything is trained or read for it."""
    from flexperts.errors import optional

    with optional("report", "a report"):
        import matplotlib  # noqa: F401


def report(console: Any, comparison: Mapping[str, Any], out: Path) -> None:
    """Write a comparison's files and print its main table, and of a run's floor."""
    from flexperts.reports.html import write_reports
    from flexperts.reports.reading import rows_shown
    from flexperts.reports.tables import tables

    write_reports(comparison, out)
    made = tables(comparison)
    for table in (made[key] for key in ("main", "floor") if key in made):
        console.print(_rich(table, narrow=console.width < _WIDE))
    if warning := rows_shown(comparison):
        console.print(f"  note: {warning}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"everything is in {out}: report.html to look at, report.md, comparison.json", soft_wrap=True)


def _collected(path: Path, samples: int) -> dict[str, Any]:
    from flexperts.studies.collect import collect_comparison, collect_run
    from flexperts.studies.finished import CLAIM

    compared = (path / CLAIM).exists() or (path / "comparison.json").exists()
    collect = collect_comparison if compared and not (path / "config.toml").exists() else collect_run
    return collect(path, samples=samples)


def _rich(table: Any, narrow: bool) -> Any:
    """Return a table with the columns that fit a terminal; the pages have all columns."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
    own = table.header[2].group
    columns = [i for i, column in enumerate(table.header) if not _is_left_out(column, own, narrow)]
    for column in (table.header[i] for i in columns):
        shown.add_column(
            f"{column.name}\n{column.group}", justify="left" if column.words else "right", overflow="fold"
        )
    for row in table.rows:
        shown.add_row(*(Text(row[i].text) for i in columns))  # as plain text: brackets are not markup
    return shown


def _is_left_out(column: Any, own: str, narrow: bool) -> bool:
    about_nll = "NLL" in column.name and (column.name, column.group) != ("NLL", own)
    if narrow and not column.words and column.group != own:
        return True
    return bool(about_nll or column.name == "received" or (narrow and column.name == "p, adjusted"))
