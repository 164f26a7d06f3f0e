"""What a reader of files hands on: records, each with its place in the file, and no opinion on what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
"""Gets what may be right but surprises, a line each."""

ENDINGS = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
PACKED = ".gz"


def unsaid(text: str) -> None:
    """Say nothing, where nobody listens or all was said before."""


class Number(str):
    """A number as its file writes it, which is how it is taken where text is wanted."""

    __slots__ = ()


def whole_number(value: object) -> int | None:
    """Return a value that is a whole number as an int, else None."""
    if isinstance(value, Number):
        return int(value) if re.fullmatch(r"-?\d{1,18}", value, re.ASCII) else None
    return value if type(value) is int else None


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file.

    Args:
        place: Where it stands. Lines are counted as editors do; a row is the how manieth record of the file it is.
        values: Column -> value: text, ``Number``, None, or whatever else the file holds.
        fault: What is wrong with it, and the rule; it then has no values.
    """

    place: str
    values: Mapping[str, Any]
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class DataTable:
    """A source whose columns are known and whose records are still to be read.

    Args:
        source: Its name, for messages.
        columns: All its columns, in its own order.
        records: Reads the records with the columns that are asked for, and maybe others.
    """

    source: str
    columns: Sequence[str]
    records: Callable[[Collection[str]], Iterable[Record]]


def name_and_ending(path: Path) -> tuple[str, str]:
    """Return a file's name without its ending, and the ending in lower case; ``.gz`` belongs to neither."""
    name = path.name
    if name.lower().endswith(PACKED) and not name.lower().endswith(f".parquet{PACKED}"):  # Parquet packs itself
        name = name[: -len(PACKED)]
    return Path(name).stem, Path(name).suffix.lower()


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that come more than once."""
    seen: set[str] = set()
    return list(dict.fromkeys(n for n in names if n in seen or seen.add(n)))  # type: ignore[func-returns-value]


def names_shown(names: Iterable[str]) -> str:
    """Return columns' names as a message shows them, but for long ones: without a header they are a row's text."""
    all_names = list(names)
    shown = [repr(n) if len(n) <= 40 else f"a name of {len(n)} characters" for n in all_names[:20]]
    return ", ".join(shown) + (f" and {len(all_names) - 20} more" if len(all_names) > 20 else "")
