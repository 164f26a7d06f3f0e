"""The one schema of instruction data, and the reading of it from mappings with any column names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flexperts.errors import DataError

FIELDS = ("instruction", "context", "response", "category")
REQUIRED = ("instruction", "response")


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction example.

    Args:
        instruction: What is asked.
        response: What the silo wants as the answer.
        context: The passage asked about; may be empty.
        category: Name of the task; may be empty.
        passage: Identity of the passage, by which train and test are told apart.
        where: File and row that it came from, for messages; no part of the row itself.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    passage: str = ""
    where: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True)
class ClientRows:
    """One client's rows: train is trained on, settings are chosen on validation, test is only reported."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    validation: tuple[Row, ...] = ()


def read_rows(
    records: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    where: str,
    passage: str | None = None,
) -> list[Row]:
    """Turn records into rows.

    Args:
        records: Mappings from column name to value.
        columns: Field name -> column name, for the fields whose column is named otherwise.
        where: Name of the source, for errors.
        passage: Column that identifies the passage; the context (or the instruction) serves where it is missing.

    Raises:
        DataError: A required column is missing, a value is not text, or there is no row.
    """
    rows = [_row(record, columns, f"{where}, row {number}", passage) for number, record in enumerate(records, 1)]
    if not rows:
        raise DataError(where, "a split needs at least one row", "add rows or leave the client out")
    return rows


def _row(record: Mapping[str, Any], columns: Mapping[str, str], where: str, passage: str | None) -> Row:
    values = {field: _value(record, field, columns, where) for field in FIELDS}
    identity = str(record.get(passage or "passage") or values["context"] or values["instruction"])
    return Row(**values, passage=_encodable(identity, f"{where}: {passage or 'passage'}"), where=where)


def _value(record: Mapping[str, Any], field: str, columns: Mapping[str, str], where: str) -> str:
    column = columns.get(field, field)
    value = record.get(column)
    # A column that the recipe names must exist: a misspelt one would leave the field empty in silence.
    if (field in REQUIRED or field in columns) and column not in record:
        raise DataError(
            f"{where}: no column {column!r} among {sorted(record)}",
            f"the {field} is required" if field in REQUIRED else f"the recipe takes the {field} from there",
            f"name its column under [data.columns], such as {field} = {_closest(column, record)!r}",
        )
    if not isinstance(value, str) and value is not None:
        raise DataError(f"{where}: {column} = {value!r}", "it must be text", "write it as a string")
    if field in REQUIRED and not (value or "").strip():
        raise DataError(f"{where}: {column} is empty", f"the {field} must hold text", "fill it in or drop the row")
    return _encodable(value or "", f"{where}: {column}")


def _encodable(text: str, where: str) -> str:
    """Return text if it has a UTF-8 form: JSON can name halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds {text[error.start]!r}", "it must be whole Unicode text", "mend it"
        ) from error
    return text


def _closest(column: str, record: Mapping[str, Any]) -> str:
    """Return the column that a misspelt one most likely means."""
    close: list[str] = difflib.get_close_matches(column, list(record), n=1, cutoff=0.0)
    return close[0] if close else "column"
