"""Instruction rows from text files, Parquet files and the hub.

Files are read directly, not through a dataset cache, so that private rows are not copied to another place on disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from flexperts.config.data import GIVEN, DataFormat, OnBadRow
from flexperts.data.delimited import read_delimited
from flexperts.data.formats import possible_columns
from flexperts.data.json_files import read_json_lines, read_json_list
from flexperts.data.records import (
    ENDINGS,
    DataTable,
    Record,
    Say,
    name_and_ending,
    names_shown,
    repeated,
    unsaid,
)
from flexperts.data.rows import Row, read_rows
from flexperts.data.tables import Given, arrow_values, given_table, python_value
from flexperts.data.text_files import decoded_text
from flexperts.errors import DataError
from flexperts.observer import libraries_drawing

HUB = "hub:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def read_source(
    source: str,
    columns: Mapping[str, str],
    *,
    split: str = "train",
    passage: str | None = None,
    format: DataFormat = "auto",
    on_bad_row: OnBadRow = "refuse",
    say: Say = unsaid,
    given: Given | None = None,
) -> list[Row]:
    """Read all rows of a file, or of a hub data set named ``hub:org/name`` or ``hub:org/name:split``.

    Args:
        source: The file or data set.
        columns, passage, format, on_bad_row, say: As for ``read_rows``.
        split: The data set's split, where the name does not include one.
        given: Rows that a Python program has given.
    """
    table = open_table(source, possible_columns(columns), split, say, given)
    return read_rows(table, columns, format=format, on_bad_row=on_bad_row, passage=passage, say=say)


def open_table(
    source: str, wanted: Collection[str], split: str = "train", say: Say = unsaid, given: Given | None = None
) -> DataTable:
    """Open a source with all its columns; see ``read_source``.

    Args:
        source: The file or data set.
        wanted: Columns that may be needed.
        split: The data set's split, where the name does not include one.
        say: Called with one line per surprising finding.
        given: Rows that a Python program has given.
    """
    if source.startswith(HUB):
        return _hub(source.removeprefix(HUB), split)
    path = Path(source)
    if source.startswith(GIVEN):
        found = given_table(source, given or {})
        if isinstance(found, DataTable):
            return found
        path = found
    path = _checked(path)
    kind = name_and_ending(path)[1]
    if kind == ".parquet":
        return _parquet(path)
    text = decoded_text(path)
    if kind in (".csv", ".tsv"):
        return read_delimited(path, text, wanted, say, "\t" if kind == ".tsv" else None)
    return read_json_lines(path, text) if kind == ".jsonl" else read_json_list(path, text)


def _checked(path: Path) -> Path:
    """Return the path if the file exists and its name, which may be a link's, ends as a data file's."""
    if name_and_ending(path)[1] not in ENDINGS:
        raise DataError(
            f"data file {str(path)!r}",
            f"data files end in {', '.join(ENDINGS)}; text files may add .gz",
            "convert it to one of these formats",
        )
    if not _is_file(path):
        raise DataError(
            f"{path}",
            "there is no such data file",
            "check the path; in a recipe it is relative to the recipe's folder",
        )
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name that is too long or contains a zero byte
        return False


def _parquet(path: Path) -> DataTable:
    """Open a Parquet file; only the requested columns are read, in batches of rows."""
    import pyarrow
    import pyarrow.parquet

    damage = (pyarrow.ArrowException, OSError, ValueError, OverflowError)

    def records(wanted: Collection[str]) -> Iterator[Record]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                read = [name for name in file.schema_arrow.names if name in wanted]
                row = 0
                for batch in file.iter_batches(columns=read):
                    columns = [arrow_values(str(path), name, batch.column(name)) for name in read]
                    for values in zip(*columns, strict=True):
                        row += 1
                        yield Record(f"row {row}", dict(zip(read, values, strict=True)))
        except DataError:
            raise
        except damage as error:
            raise _unreadable(path, error) from error

    try:
        columns = pyarrow.parquet.read_schema(path).names
    except damage as error:
        raise _unreadable(path, error) from error
    if twice := repeated(columns):
        raise DataError(
            f"{path}: {names_shown(twice)}", "column names must be unique", "rename or drop the duplicates"
        )
    return DataTable(str(path), columns, records)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}", f"it is not a readable Parquet file ({error})", "copy it or write it again")


def _hub(name: str, split: str) -> DataTable:
    """Open a hub data set; it is stored on this machine and mapped into memory; only requested columns are read."""
    from datasets import load_dataset

    name, _, named_split = name.partition(":")
    if not _HUB_NAME.fullmatch(name):  # the library would also accept a path or an address
        raise DataError(
            f"{HUB}{name}", "a hub data set is called org/name", "write hub:org/name, or give a file's path"
        )
    try:
        with libraries_drawing():
            found = load_dataset(name, split=named_split or split)
        columns = list(found.column_names)
    except Exception as error:  # the library raises a dozen kinds; each means that the rows cannot be loaded
        raise _unloadable(name, error) from error

    def records(wanted: Collection[str]) -> Iterator[Record]:
        try:
            chosen = found.select_columns([c for c in columns if c in wanted])
            for row, values in enumerate(chosen, 1):
                yield Record(f"row {row}", {column: python_value(value) for column, value in values.items()})
        except Exception as error:
            raise _unloadable(name, error) from error

    return DataTable(f"{HUB}{name}", columns, records)


def _unloadable(name: str, error: Exception) -> DataError:
    return DataError(
        f"{HUB}{name}",
        f"the hub data set cannot be loaded ({error})",
        "check the name, the network, and that $HF_HOME is writable",
    )
