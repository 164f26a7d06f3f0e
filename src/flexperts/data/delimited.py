"""Tables as text: cells separated by commas, semicolons or tabs, quoted as in RFC 4180.

With Python's csv module, a quote that is not closed swallows the rows after it, the last of two columns with one
name wins, and the limit on a cell's size holds for the whole process. Here a file is refused unless it is certain
where its rows end.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flexperts.data.records import DataTable, Record, Say, names_shown, repeated
from flexperts.errors import DataError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_QUOTED = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"')
_BREAK = re.compile(r"\r\n?|\n")
_NAMED_DELIMITER = re.compile(r'"?sep=([,;|\t])"?(?:\r\n?|\n)')  # a first line that Excel writes
_DOUBLE = 'double each quote that belongs to the text (""), and quote the whole cell'
_TOLD = 10


class _Line(NamedTuple):
    number: int
    cells: list[str]
    stray: bool
    """Whether an unquoted cell contains a quote."""


def read_delimited(
    path: Path, text: str, wanted: Collection[str], say: Say, delimiter: str | None = None
) -> DataTable:
    """Return a table's columns and records; lines without any text are skipped.

    Args:
        path: The file, for messages.
        text: The text of the file.
        wanted: Columns that may be needed; they decide where the header contains several possible delimiters.
        say: Called with a line about what is skipped, and about cells that may have swallowed rows.
        delimiter: The delimiter, where the file's extension determines it.
    """
    start = 0
    if named := _NAMED_DELIMITER.match(text):
        delimiter, start = named[1], named.end()
    delimiter = delimiter or _delimiter(path, text, wanted)
    lines = _lines(path, text, delimiter, start)
    header = [name.strip() for name in _header(lines)]
    columns = _columns(path, header)
    records = list(_records(path, columns, len(header), lines, delimiter, say))
    return DataTable(str(path), columns, lambda _: records)


def _header(lines: Iterator[_Line]) -> list[str]:
    return next((line.cells for line in lines), [])


def _delimiter(path: Path, text: str, wanted: Collection[str]) -> str:
    """Return the delimiter with which the header has the most wanted columns."""
    found = {}
    for delimiter in DELIMITERS:
        with contextlib.suppress(DataError):  # with the wrong delimiter, quotes may end inside a cell
            header = {name.strip() for name in _header(_lines(path, text, delimiter, 0))}
            found[delimiter] = len(header) > 1, len(header & {*wanted})
    best = [delimiter for delimiter, score in found.items() if score == max(found.values())]
    if len(best) == 1 or not text.strip() or not found:
        return best[0] if best else ","
    several = found[best[0]][0]
    what = f"its header may have {' or '.join(DELIMITERS[d] for d in best)}" if several else "its header has none"
    raise DataError(
        f"{path}: {what}",
        "cells are separated by commas, semicolons or tabs, and the first line names the columns",
        "save the table in this form, and quote cells that contain a delimiter",
    )


def _columns(path: Path, header: Sequence[str]) -> list[str]:
    """Return the columns' names, without the empty ones that spreadsheets leave at the end."""
    named = [name or f"(column {number})" for number, name in enumerate(header, 1)]
    last = max((n for n, name in enumerate(header, 1) if name), default=0)
    if twice := repeated(named[:last]):
        raise DataError(
            f"{path}: {names_shown(twice)}", "column names must be unique", "rename or delete the duplicates"
        )
    return named[:last]


def _records(
    path: Path, columns: Sequence[str], width: int, lines: Iterator[_Line], delimiter: str, say: Say
) -> Iterator[Record]:
    beyond = width > len(columns)
    blank: list[int] = []
    swallowing: list[int] = []
    row = 0
    for line in lines:
        if not any(cell.strip() for cell in line.cells):
            blank.append(line.number)
            continue
        row += 1
        place = f"line {line.number}, row {row}"
        if fault := _fault(line, len(columns)):
            yield Record(place, {}, fault)
            continue
        beyond = beyond or len(line.cells) > len(columns)
        if any(_holds_rows(cell, len(columns), delimiter) for cell in line.cells):
            swallowing.append(line.number)
        yield Record(place, dict(zip(columns, line.cells, strict=False)))
    if beyond:
        say(f"{path}: empty cells after the {len(columns)} named columns are ignored")
    if blank:
        say(f"{path}: {len(blank)} rows without any text are skipped ({_numbers(blank)})")
    if swallowing:
        say(
            f"{path}: {len(swallowing)} quoted cells contain lines that look like separate rows; "
            f"check where their quotes close (rows that start at {_numbers(swallowing)})"
        )


def _fault(line: _Line, columns: int) -> tuple[str, str] | None:
    if line.stray:
        return "an unquoted cell contains a quote", _DOUBLE
    if len(line.cells) < columns:
        return f"it has fewer cells than the {columns} columns of the header", "each row must have all columns"
    if any(cell.strip() for cell in line.cells[columns:]):
        return f"it has more cells than the {columns} columns of the header", "quote cells that contain delimiters"
    return None


def _holds_rows(cell: str, columns: int, delimiter: str) -> bool:
    """Return whether a later line of a cell has as many delimiters as a row, none of them before a space."""
    inner = _BREAK.split(cell)[1:]
    return any(line.count(delimiter) == columns - 1 and f"{delimiter} " not in line for line in inner)


def _numbers(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
    return f"line {', '.join(map(str, lines[:_TOLD]))}{more}"


def _lines(path: Path, text: str, delimiter: str, start: int) -> Iterator[_Line]:
    """Yield a table's rows, each with the line where it starts; empty lines are left out."""
    ends = re.compile(rf"[{re.escape(delimiter)}\r\n]|\Z")
    at, number = start, 1 + len(_BREAK.findall(text, 0, start))
    while at < len(text):
        first, cells, stray = number, [], False
        while True:
            if text.startswith('"', at):
                cell, at = _quoted(path, text, at, number, delimiter)
                number += len(_BREAK.findall(cell))
                cells.append(cell.replace('""', '"'))
            else:
                end = next(ends.finditer(text, at)).start()
                cell, at = text[at:end], end
                cells.append(cell)
                stray = stray or '"' in cell
            if not text.startswith(delimiter, at):
                break
            at += 1
        if ending := _BREAK.match(text, at):
            at, number = ending.end(), number + 1
        if cells != [""]:
            yield _Line(first, cells, stray)


def _quoted(path: Path, text: str, at: int, number: int, delimiter: str) -> tuple[str, int]:
    """Return a quoted cell and where it ends; refuse the file where text follows the closing quote."""
    cell = _QUOTED.match(text, at)
    if cell is None:
        raise DataError(
            f"{path}, line {number}",
            "a quote opens a cell here and is never closed",
            f"close the quote, or {_DOUBLE}",
        )
    if text[cell.end() : cell.end() + 1] not in ("", "\r", "\n", delimiter):
        closing = number + len(_BREAK.findall(cell[1]))
        raise DataError(
            f"{path}, line {number}",
            f"a quote opens a cell here, and text follows the quote that closes it (line {closing})",
            _DOUBLE,
        )
    return cell[1], cell.end()
