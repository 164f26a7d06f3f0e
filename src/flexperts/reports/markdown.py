"""The report as Markdown, for papers and pull requests: the page's tables and texts, without plots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from flexperts.reports.cells import Cell, Table
from flexperts.reports.reading import Comparison, rows_shown
from flexperts.reports.summary import facts, summary
from flexperts.reports.tables import tables


def markdown_report(comparison: Mapping[str, Any]) -> str:
    """Return the content of the HTML page as Markdown; texts from data are escaped.

    Args:
        comparison: The content of ``comparison.json``.
    """
    made = tables(comparison)
    warning = rows_shown(comparison)
    parts = [f"# {_line(comparison['title'])}", *([f"> **{_line(warning)}**"] if warning else [])]
    parts += map(_line, summary(comparison))
    parts.append(", ".join(f"{name}: {_line(value)}" for name, value in facts(comparison)))
    setup = [made.pop(key) for key in ("entries", "environment") if key in made]
    parts += map(markdown_table, made.values())
    parts += _examples(comparison)
    parts += map(markdown_table, setup)
    parts.append(f"## Recipe\n\n{_fenced(comparison['recipe'])}")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """Return one table with its heading and note."""
    note = f"\n\n{_line(table.note)}" if table.note else ""
    return f"## {_line(table.title)}\n\n{markdown_grid(table)}{note}"


def markdown_grid(table: Table, *, grouped: bool = True) -> str:
    """Return the header and the cells of a table; ``grouped`` says whether headers name the state and the rows."""
    head = [_line(column.text if grouped else column.name) for column in table.header]
    rule = ["---" if i == 0 or column.words else "---:" for i, column in enumerate(table.header)]
    lines = [head, rule, *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: object) -> str:
    """Return text without markup of Markdown, its tables or HTML; line breaks are kept."""
    out = escape(str(text), quote=False)
    # Brackets are a link only if an address or a definition follows.
    out = re.sub(r"([\\`*|~$]|!(?=\[)|\](?=[(\[:]))", r"\\\1", out)
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", out)


def _line(text: object) -> str:
    """Return escaped text on one line that does not start a list, heading or rule."""
    return re.sub(r"^([#+=-]|\d+(?=[.)]))", _disarmed, escaped(" ".join(str(text).split())))


def _disarmed(match: re.Match[str]) -> str:
    text = match.group()
    return f"\\{text}" if not text[0].isdigit() else f"{text}\u200b"


def _cell(cell: Cell) -> str:
    text = escaped(" ".join(cell.text.split()))
    return f"**{text}**" if cell.best else text


def _examples(comparison: Comparison) -> Iterator[str]:
    for i, (client, rows) in enumerate((comparison.get("examples") or {}).items()):
        yield f"{'## Examples' if i == 0 else ''}\n\n### {_line(client)}".strip()
        for row in rows:
            said = {
                "instruction": row["instruction"],
                "context": row["context"],
                "response in the data": row["response"],
            }
            yield "\n".join(
                f"- {_line(name)}: {_line(text)}" for name, text in (said | row["answers"]).items() if text
            )


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}toml\n{text.rstrip()}\n{fence}"
