"""The schema of instruction data, and how tables with any column names are read into it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flexperts.config.data import OnBadRow
from flexperts.config.names import one_label
from flexperts.data.bad_rows import BadRow, BadValueError, settle_bad_rows
from flexperts.data.columns import FIELDS, PASSAGE, REQUIRED, fields_of, say_columns
from flexperts.data.pairs import with_texts
from flexperts.data.records import DataTable, Number, Record, Say, names_shown, unsaid, whole_number
from flexperts.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction example.

    Args:
        instruction: What is asked.
        response: What the silo wants as the answer.
        context: The passage asked about; may be empty.
        category: Name of the task; may be empty.
        passage: Identity of the passage, by which train and test are separated.
        where: File, line and row that it came from, for messages; not part of the row's content.
        rejected: An answer that the silo likes less than ``response``; empty in rows that are not preferences.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    passage: str = ""
    where: str = dataclasses.field(default="", compare=False)
    rejected: str = ""


@dataclass(frozen=True)
class ClientRows:
    """One client's rows: train for training, validation for choosing settings, test only for reported scores."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    validation: tuple[Row, ...] = ()


class Label(NamedTuple):
    """The column with each row's category or client.

    Args:
        column: The field category, or any column.
        rule: Why each row needs a label, for messages.
    """

    column: str
    rule: str


def read_rows(
    table: DataTable,
    columns: Mapping[str, str],
    *,
    on_bad_row: OnBadRow = "refuse",
    passage: str | None = None,
    say: Say = unsaid,
) -> list[Row]:
    """Turn a table into rows.

    Args:
        table: The table.
        columns: Field -> column, for the fields whose column has another name; see ``columns.fields_of``.
        on_bad_row: Whether rows that cannot be used are left out.
        passage: Column that identifies the passage; where it is missing, the context (or instruction) is used.
        say: Called with one line per surprising finding.
    """
    return read_labelled(table, columns, None, on_bad_row=on_bad_row, passage=passage, say=say)[0]


def read_labelled(
    table: DataTable,
    columns: Mapping[str, str],
    label: Label | None,
    *,
    on_bad_row: OnBadRow = "refuse",
    passage: str | None = None,
    say: Say = unsaid,
) -> tuple[list[Row], list[str]]:
    """Turn a table into rows and their labels; see ``read_rows``. Without ``label`` the labels are empty."""
    fields = fields_of(table.source, table.columns, columns) if table.columns else {name: name for name in REQUIRED}
    by = _label_column(table, fields, label) if label and table.columns else None
    identity = passage or PASSAGE
    used = {*fields.values(), identity, *([by] if by else [])}
    good: list[tuple[Row, str]] = []
    bad: list[BadRow] = []
    numbers: Counter[str] = Counter()  # field -> how many rows have a number in it
    for record in table.records(used):
        where = f"{table.source}, {record.place}"
        try:
            row = _row(record, fields, identity, where)
            good.append((row, _label(record, by, label) if by and label else ""))
        except BadValueError as error:
            bad.append(BadRow(where, error.what, error.rule))
        else:
            numbers.update(f for f in FIELDS[:3] if isinstance(record.values.get(fields.get(f, "")), Number))
    if not (good or bad):
        raise DataError(table.source, "a split needs at least one row", "add rows or leave the client out")
    settle_bad_rows(table.source, bad, len(good) + len(bad), on_bad_row, say)
    say_columns(table.source, table.columns, columns, fields, identity, by or "", say=say)
    rows = [row for row, _ in good]
    _say_texts(table.source, rows, numbers, say)
    return rows, [text for _, text in good]


def _say_texts(source: str, rows: Sequence[Row], numbers: Mapping[str, int], say: Say) -> None:
    """Report surprising findings in the rows' texts, in counts only."""
    if numbers:
        counts = ", ".join(f"{field} of {count} rows" for field, count in numbers.items())
        say(f"{source}: numbers are used as text, exactly as written ({counts})")
    if broken := sum("\ufffd" in f"{row.instruction}{row.context}{row.response}{row.rejected}" for row in rows):
        say(f"{source}: {broken} rows contain U+FFFD, which replaces a character that a conversion lost")


def _row(record: Record, fields: Mapping[str, str], identity: str, where: str) -> Row:
    if record.fault:
        raise BadValueError(*record.fault)
    told = with_texts(record.values, fields) if "rejected" in fields else record.values
    values = {field: _field(told, field, column) for field, column in fields.items()}
    if values.get("rejected") == values["response"]:
        raise BadValueError(f"{fields['rejected']} is the same as {fields['response']}", "a pair has two answers")
    named = _text(told, identity)
    passage = named if named.strip() else values.get("context") or values["instruction"]
    return Row(**values, passage=passage, where=where)


def _field(values: Mapping[str, Any], field: str, column: str) -> str:
    if field not in (*REQUIRED, "rejected"):
        return _text(values, column)
    if column not in values:
        raise BadValueError(f"no {column}", f"the {field} is required")
    text = _text(values, column)
    if not text.strip():
        raise BadValueError(f"{column} is empty", f"the {field} must contain text")
    return text


def _text(values: Mapping[str, Any], column: str) -> str:
    """Return a value as text; None becomes empty text."""
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadValueError(f"{column} is {_kind(value)}", "it must be text or a number")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain lone surrogates, which no tokenizer accepts
        raise BadValueError(
            f"{column} contains half of a character", "it must be valid Unicode text, without lone surrogates"
        ) from error
    return str(value)


def _kind(value: object) -> str:
    """Return a value's kind, for a message that must not show the value."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "a list of objects, such as a chat"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    kinds = {bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")


def _label_column(table: DataTable, fields: Mapping[str, str], label: Label) -> str:
    column = fields.get("category", "category") if label.column == "category" else label.column
    if column not in table.columns:
        raise DataError(
            f"{table.source}: no column {column!r} among [{names_shown(table.columns)}]",
            "data.partition.column must name one of the columns",
            "set data.partition.column to one of these names",
        )
    return column


def _label(record: Record, column: str, label: Label) -> str:
    """Return a label as text; ids are often whole numbers."""
    text = one_label(_text(record.values, column))
    if isinstance(record.values.get(column), Number) and whole_number(record.values[column]) is None:
        raise BadValueError(f"{column} is not a whole number", "it must be text or a whole number")
    if not text:
        raise BadValueError(f"{column} is empty", label.rule)
    return text
