"""Tables in memory: rows that a Python program gives, and Arrow's columns as values.

A program gives rows as a ``datasets.Dataset``, a table of pandas, polars or Arrow, or a list of mappings. The
recipe names them by a source such as ``python:clinic/train``; they are on disk only if a run is asked to keep them.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexperts.config.data import GIVEN, DataConfig
from flexperts.data.formats import possible_columns
from flexperts.data.records import DataTable, Number, Record, names_shown, repeated
from flexperts.errors import DataError
from flexperts.files import json_text, write_text

Given = Mapping[str, Any]
"""Source -> the rows: a table, a list of mappings, or the file in which a run keeps them."""
_FOLDER = "rows"
_BATCH = 1000
"""Rows that are converted together."""


def given_source(client: str, side: str) -> str:
    """Return the source of a client's train or test rows in a recipe."""
    return f"{GIVEN}{client}/{side}"


def given_table(source: str, given: Given) -> DataTable | Path:
    """Open rows that a Python program has given, or return the file in which the run keeps them.

    Args:
        source: The source in the recipe.
        given: What the program has given, or the run keeps.
    """
    if source not in given:
        raise DataError(
            source,
            "these rows were given from Python, and the run does not keep them",
            "give the same rows again, such as with flexperts.federate(..., resume=True)",
        )
    rows = given[source]
    if isinstance(rows, Path):
        return rows
    if (columns := _columns(rows)) is not None:
        if twice := repeated(columns):
            raise DataError(f"{source}: {names_shown(twice)}", "column names must be unique", "rename or drop them")
        return DataTable(source, columns, lambda wanted: _of_table(source, rows, columns, wanted))
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        keys = dict.fromkeys(str(key) for row in rows if isinstance(row, Mapping) for key in row)
        return DataTable(source, list(keys), lambda _: _of_list(rows))
    kind = f"{type(rows).__module__}.{type(rows).__name__}"
    raise DataError(
        f"{source}: {kind}",
        "rows are a datasets.Dataset, a table of pandas, polars or Arrow, a list of mappings, or a file's path",
        "convert them, such as with list(...)",
    )


def keep_given(given: Given, config: DataConfig, run: Path) -> None:
    """Write rows that a program has given into the run directory, with the columns that may be read and no others.

    Args:
        given: The rows.
        config: The recipe's data section, which names the columns of every client.
        run: The run directory.
    """
    for source in given:
        table = given_table(source, given)
        if isinstance(table, Path):
            continue
        wanted = possible_columns(config.of_client(source.removeprefix(GIVEN).rpartition("/")[0]).columns)
        kept = ({k: _plain(v) for k, v in one.values.items() if k in wanted} for one in table.records(wanted))
        text = "".join(f"{json_text(values)}\n" for values in kept)
        write_text(run / _FOLDER / f"{source.removeprefix(GIVEN)}.jsonl", text)


def kept_given(run: Path) -> dict[str, Path]:
    """Return the files of the rows that a run directory keeps, by their source."""
    return {given_source(file.parent.name, file.stem): file for file in (run / _FOLDER).glob("*/*.jsonl")}


def _columns(rows: Any) -> list[str] | None:
    """Return a table's columns; None for what is not a table."""
    if _is("datasets", "Dataset", rows):
        return list(rows.column_names)
    if _is("pandas", "DataFrame", rows):
        return [str(name) for name in rows.columns]
    if hasattr(rows, "__arrow_c_stream__"):
        import pyarrow

        return list(pyarrow.table(rows).column_names)
    return None


def _is(module: str, name: str, rows: Any) -> bool:
    """Return whether rows are of a library's class; a library that is not imported has made none."""
    return module in sys.modules and isinstance(rows, getattr(sys.modules[module], name))


def _of_table(source: str, rows: Any, columns: Sequence[str], wanted: Collection[str]) -> Iterator[Record]:
    read = [name for name in columns if name in wanted]
    number = 0
    for batch in _batches(source, rows, columns, read):
        for values in zip(*(arrow_values(source, name, batch[name]) for name in read), strict=True):
            number += 1
            yield Record(f"row {number}", dict(zip(read, values, strict=True)))


def _batches(source: str, rows: Any, columns: Sequence[str], read: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield some rows at a time, as Arrow's column of each name."""
    import pyarrow

    if _is("datasets", "Dataset", rows):
        for table in rows.select_columns(list(read)).with_format("arrow").iter(_BATCH):
            yield {name: table.column(name) for name in read}
        return
    if _is("pandas", "DataFrame", rows):
        found = {name: _of_pandas(source, name, rows.iloc[:, list(columns).index(name)]) for name in read}
        rows = pyarrow.table(found)
    for batch in pyarrow.table(rows).select(list(read)).to_batches(_BATCH):
        yield {name: batch.column(name) for name in read}


def _of_pandas(source: str, name: str, column: Any) -> Any:
    import pyarrow

    try:
        return pyarrow.array(column, from_pandas=True)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:  # it quotes a value
        raise _mixed(source, name, str(column.dtype)) from error


def _mixed(source: str, name: str, kind: str) -> DataError:
    return DataError(
        f"{source}: column {name!r} of type {kind}", "it must be text or a number", "convert the column to text"
    )


def arrow_values(source: str, name: str, column: Any) -> list[Any]:
    """Return an Arrow column as Python values; Arrow writes numbers as text, with as few digits as they need.

    Args:
        source: The source, for messages.
        name: The column's name, for messages.
        column: The column.
    """
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type):
        column = pyarrow.compute.cast(column, column.type.value_type)
    kind = column.type
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)):
        try:
            return list(column.to_pylist())
        except (ValueError, OverflowError) as error:  # its message contains a value, which must not be shown
            raise _mixed(source, name, str(kind)) from error
    text = column.cast(pyarrow.string()).to_pylist()
    finite = pyarrow.compute.is_finite(column).to_pylist()
    return [t if t is None else Number(t) if f else float("nan") for t, f in zip(text, finite, strict=True)]


def _of_list(rows: Sequence[Any]) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            values = {str(column): python_value(value) for column, value in row.items()}
            yield Record(f"row {number}", values)
        else:
            yield Record(f"row {number}", {}, ("it is not a mapping", "a row maps column names to values"))


def python_value(value: Any) -> Any:
    """Return a value of a Python object as a record has it: finite numbers as text, all else unchanged."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return Number(value) if is_number and math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it; one that no row may have becomes another such value, an object."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    allowed = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if allowed else {}
