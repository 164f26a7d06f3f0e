"""Readers of JSON and JSON lines. Numbers stay as written; an object with a repeated key is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexperts.data.records import DataTable, Number, Record, names_shown, repeated
from flexperts.errors import DataError

_LINE = "each line must hold one JSON object"


class _Repeating(dict[str, Any]):
    """An object with repeated keys."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = repeated(name for name, _ in pairs)


def read_json_lines(path: Path, text: str) -> DataTable:
    """Return the columns and records of a file with one object per line; any other line is a bad record."""
    if text.lstrip().startswith("["):
        raise DataError(f"{path}: it contains one list", _LINE, "rename the file to .json, for a list of objects")
    return _table(path, list(_from_lines(text)))


def read_json_list(path: Path, text: str) -> DataTable:
    """Return the columns and records of a file that contains one list of objects."""
    try:
        found = _parsed(text)
    except (ValueError, RecursionError) as error:
        by_line = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        remedy = (
            "rename it to .jsonl if it has one object per line" if by_line else "correct the file at this place"
        )
        raise DataError(f"{path}", f"it is not valid JSON ({_reason(error)})", remedy) from error
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise DataError(f"{path}", "it must contain a list of objects", "write one object per row, or use .jsonl")
    return _table(path, [_record(f"row {number}", values) for number, values in enumerate(found, 1)])


def _table(path: Path, records: list[Record]) -> DataTable:
    columns = list(dict.fromkeys(name for record in records for name in record.values))
    return DataTable(str(path), columns, lambda _: records)


def _from_lines(text: str) -> Iterator[Record]:
    row = 0
    for number, line in enumerate(
        re.split(r"\r\n?|\n", text), 1
    ):  # str.splitlines also splits at characters that JSON allows inside a text
        if line.strip():
            row += 1
            yield _of_line(line, f"line {number}, row {row}")


def _of_line(line: str, place: str) -> Record:
    try:
        found = _parsed(line)
    except (ValueError, RecursionError) as error:
        return Record(place, {}, (f"it is not valid JSON ({_reason(error)})", _LINE))
    return (
        _record(place, found) if isinstance(found, dict) else Record(place, {}, ("it is not a JSON object", _LINE))
    )


def _record(place: str, found: dict[str, Any]) -> Record:
    if isinstance(found, _Repeating):
        return Record(place, {}, (f"{names_shown(found.names)} is repeated", "an object's keys must be unique"))
    return Record(place, found)


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_int=Number, parse_float=Number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeating(pairs)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return (
            f"{error.msg} at line {error.lineno}, column {error.colno}"
            if error.lineno > 1
            else (f"{error.msg} at column {error.colno}")
        )
    return "it is nested too deeply"
