"""Records: what a reader of files returns, each with its place in the file, before it becomes a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
"""Called with one line per finding that may be right but is surprising."""

ENDINGS = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
PACKED = ".gz"


def unsaid(text: str) -> None:
    """Ignore a line, where no one listens or everything was reported before."""


class Number(str):
    """A number as its file writes it; it is used like this where text is needed."""

    __slots__ = ()


def whole_number(value: object) -> int | None:
    """Return a whole number as an int; None for any other value."""
    if isinstance(value, Number):
        return int(value) if re.fullmatch(r"-?\d{1,18}", value, re.ASCII) else None
    return value if type(value) is int else None


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file.

    Args:
        place: Line, counted as editors do, and row: the record's number in the file, from 1.
        values: Column -> value: text, ``Number``, None, or any other value of the file.
        fault: What is wrong with the record, and the rule; it then has no values.
    """

    place: str
    values: Mapping[str, Any]
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class DataTable:
    """A source whose columns are known and whose records are not read yet.

    Args:
        source: The source's name, for messages.
        columns: All columns, in the order of the source.
        records: Reads the records with the requested columns; they may have more.
    """

    source: str
    columns: Sequence[str]
    records: Callable[[Collection[str]], Iterable[Record]]


def name_and_ending(path: Path) -> tuple[str, str]:
    """Return a file's name without extension, and the extension in lower case; ``.gz`` is in neither."""
    name = path.name
    if name.lower().endswith(PACKED) and not name.lower().endswith(
        f".parquet{PACKED}"
    ):  # Parquet compresses itself
        name = name[: -len(PACKED)]
    return Path(name).stem, Path(name).suffix.lower()


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once."""
    seen: set[str] = set()
    return list(dict.fromkeys(n for n in names if n in seen or seen.add(n)))  # type: ignore[func-returns-value]


def names_shown(names: Iterable[str]) -> str:
    """Return column names as a message shows them; only the length of long ones, which may be a row's text."""
    all_names = list(names)
    shown = [repr(n) if len(n) <= 40 else f"a name of {len(n)} characters" for n in all_names[:20]]
    return ", ".join(shown) + (f" and {len(all_names) - 20} more" if len(all_names) > 20 else "")
