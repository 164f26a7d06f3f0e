"""Reading instruction rows from JSONL, JSON, CSV and Parquet files and from the hub.

Files are read directly, not through a dataset cache: private rows are not copied elsewhere on the disk.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flexperts.data.passages import OWN_COLUMN, Say, identities, passage_key, say_uneven, silent
from flexperts.data.rows import ClientRows, Row, read_rows
from flexperts.errors import DataError
from flexperts.seeding import derive_seed

Record = Mapping[str, Any]
HUB = "hub:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_PAIRS = 3
"""Shared passages that a message tells the places of."""


def read_source(
    source: str, columns: Mapping[str, str], *, split: str = "train", passage: str | None = None
) -> list[Row]:
    """Read all rows of a file, or of a hub data set named ``hub:org/name`` or ``hub:org/name:split``.

    Raises:
        DataError: The source is missing, of an unknown kind, damaged, or breaks the row rules.
    """
    return read_rows(read_records(source, split), columns, where=source, passage=passage)


def read_records(source: str, split: str = "train") -> Iterator[Record]:
    """Read a source's records with all their columns; see ``read_source``.

    Raises:
        DataError: The source is missing, of an unknown kind, or damaged.
    """
    return _hub(source.removeprefix(HUB), split) if source.startswith(HUB) else _file(Path(source))


def split_rows(
    rows: Sequence[Row],
    fraction: float,
    seed: int,
    where: str,
    side: Literal["test", "validation"] = "test",
    *,
    whole: Sequence[Row] = (),
    say: Say = silent,
) -> ClientRows:
    """Divide rows by passage: all rows of a passage land on one side, chosen by a hash of the passage.

    Args:
        rows: The rows.
        fraction: Share of the passages that is held out.
        seed: Seed of the choice.
        where: Whose rows they are, for messages.
        side: What the rows are held out for; they are the returned ``test``.
        whole: All rows of the client, where these are not all.
        say: Gets what surprises, in lines.

    Raises:
        DataError: One side would be empty.
    """
    texts = identities(rows, whole or rows, where, say)
    keys = [passage_key(text) for text in texts]
    passages: dict[str, str] = {}
    for key, text in zip(keys, texts, strict=True):
        passages[key] = min(text, passages.get(key, text))  # of several spellings one, whatever the rows' order
    order = sorted(passages, key=lambda key: derive_seed(seed, f"{side} split", passages[key]))
    held_out = set(order[: round(fraction * len(order))])
    train = tuple(row for row, key in zip(rows, keys, strict=True) if key not in held_out)
    test = tuple(row for row, key in zip(rows, keys, strict=True) if key in held_out)
    if not train or not test:
        raise DataError(
            f"{where}: {len(order)} passages with {side}_fraction = {fraction}",
            f"train and {side} need at least one passage each",
            f"add passages, take another share, or give a test file; {OWN_COLUMN}",
        )
    say_uneven(rows, keys, where, say)
    return ClientRows(train, test)


def check_disjoint(rows: ClientRows, where: str, *, say: Say = silent) -> ClientRows:
    """Return ``rows`` unless a test passage was trained on.

    Args:
        rows: A client's rows.
        where: Whose they are, for messages.
        say: Gets what surprises, in lines.

    Raises:
        DataError: Train and test share a passage; rows are named and no passage is quoted.
    """
    both = (*rows.train, *rows.test)
    keys = [passage_key(text) for text in identities(both, both, where, say)]
    trained = _places(rows.train, keys[: len(rows.train)], "train")
    tested = _places(rows.test, keys[len(rows.train) :], "test")
    if shared := [key for key in tested if key in trained]:
        pairs = "; ".join(f"{tested[key]} and {trained[key]}" for key in shared[:_PAIRS])
        raise DataError(
            f"{where}: {len(shared)} passages stand in train and in test, such as {pairs}",
            "a test passage must never be trained on, in no other case, blanks, quotes or Unicode form either",
            f"split by passage, or give one file and data.test_fraction; {OWN_COLUMN}",
        )
    return rows


def _places(rows: Sequence[Row], keys: Sequence[str], side: str) -> dict[str, str]:
    """Return where each passage stands first."""
    places: dict[str, str] = {}
    for number, (row, key) in enumerate(zip(rows, keys, strict=True), 1):
        places.setdefault(key, row.where or f"{side} row {number}")
    return places


def _file(path: Path) -> Iterator[Record]:
    readers: dict[str, Callable[[Path], Iterator[Record]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    if path.suffix.lower() not in readers:
        endings = ", ".join(sorted(readers))
        raise DataError(f"data file {str(path)!r}", f"data files end in {endings}", "convert it to one of these")
    if not _is_file(path):
        raise DataError(
            f"{path}",
            "there is no such data file",
            "check the path; in a recipe it is relative to the recipe's folder",
        )
    return readers[path.suffix.lower()](path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _jsonl(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}", f"it is not readable UTF-8 text ({error})", "save it as UTF-8") from error


def _json(path: Path) -> Iterator[Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}", f"it is not valid JSON ({error})", "mend it") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise DataError(f"{path}", "it must hold a list of objects", "write one object per row, or use .jsonl")
    yield from records


def _object(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"it is not valid JSON ({error})", "mend or remove the line") from error
    if not isinstance(record, dict):
        raise DataError(where, "each line must hold one JSON object", "mend or remove the line")
    return record


def _csv(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            for record in reader:
                if None in record:
                    raise DataError(
                        f"{path}, line {reader.line_num}",
                        f"it has more cells than the {len(reader.fieldnames or ())} columns of the header",
                        "quote cells that hold commas",
                    )
                yield record
    except (UnicodeDecodeError, OSError, csv.Error) as error:
        raise DataError(f"{path}", f"it is not a readable CSV file ({error})", "save it as UTF-8 CSV") from error


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}", f"it is not a readable Parquet file ({error})", "write it again") from error


def _hub(name: str, split: str) -> Iterator[Record]:
    from datasets import load_dataset

    name, _, named_split = name.partition(":")
    if not _HUB_NAME.fullmatch(name):  # the library would take a path or an address too
        raise DataError(f"{HUB}{name}", "a hub data set is called org/name", "name one, or give a file's path")
    try:
        yield from load_dataset(name, split=named_split or split)
    except Exception as error:  # the library raises a dozen kinds; each means that the rows cannot be had
        raise DataError(
            f"{HUB}{name}",
            f"the hub data set cannot be loaded ({error})",
            "check name and network, and that $HF_HOME can be written",
        ) from error
