"""One pooled instruction set, divided over clients by name: every row goes to exactly one of them.

Where the recipe names no test file, each client holds out ``data.test_fraction`` of its own passages. A test file
is shared. With ``pathological`` and ``natural`` a client is scored on the test rows of its own categories or id;
clients that share a category share its test rows. With ``iid`` and ``dirichlet``, where clients have no fixed kind
of row, each is scored on all of them. A passage may stand with several clients, but never on both sides of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import regex

from flexperts.config.data import DataConfig, PartitionConfig
from flexperts.config.names import normal
from flexperts.data.partitioners import Shares, assign
from flexperts.data.passages import Say, silent
from flexperts.data.rows import ClientRows, Row, read_rows
from flexperts.data.sources import Record, check_disjoint, read_records, split_rows
from flexperts.errors import DataError

Labelled = tuple[list[Row], list[str]]
_SHARED_TEST = ("iid", "dirichlet")
_SAID = 3
"""Lines about clients, of whom there may be thousands."""


def load_partition(config: DataConfig, seed: int, *, say: Say = silent) -> dict[str, ClientRows]:
    """Read the pooled rows and divide them as ``config.partition`` says.

    Args:
        config: A data section with a partition.
        seed: The run's seed.
        say: Gets what surprises, in lines.

    Raises:
        DataError: A file breaks a rule, a row has no label, the rows cannot be divided so that every client gets
            ``min_rows`` of them, or a client would have no test rows.
    """
    settings = config.partition
    assert settings is not None
    rows, labels = _read(settings.source, "train", settings, config.columns)
    shares = assign(labels, settings, seed, say=say)
    said: list[str] = []
    if settings.test is None:
        divided = {
            name: split_rows([rows[i] for i in share], config.test_fraction, seed, name, say=said.append)
            for name, share in shares.items()
        }
    else:
        test = _read(settings.test, "test", settings, config.columns)
        tests = _tests(shares, labels, test, settings)
        divided = {n: ClientRows(tuple(rows[i] for i in share), tests[n]) for n, share in shares.items()}
        if settings.by in _SHARED_TEST:  # every client is scored on all of it: one look instead of one for each
            check_disjoint(ClientRows(tuple(rows), tuple(test[0])), settings.source, say=said.append)
        else:
            divided = {n: check_disjoint(own, n, say=said.append) for n, own in divided.items()}
    for text in said[:_SAID]:
        say(text)
    if more := len(said) - _SAID if len(said) > _SAID else 0:
        say(f"{settings.source}: {more} more lines like these about other clients")
    return divided


def _tests(
    shares: Shares, labels: list[str], test: Labelled, settings: PartitionConfig
) -> dict[str, tuple[Row, ...]]:
    """Return every client's rows of the shared test file."""
    if settings.by in _SHARED_TEST:
        return dict.fromkeys(shares, tuple(test[0]))
    if strange := sorted(set(test[1]) - set(labels)):
        raise DataError(
            f"{settings.test}: {settings.column} {strange[0]!r}",
            "no client trains on rows with this label",
            "drop these test rows, or add such rows to the source",
        )
    return {name: _of(name, {labels[i] for i in share}, test, settings) for name, share in shares.items()}


def _of(name: str, own: set[str], test: Labelled, settings: PartitionConfig) -> tuple[Row, ...]:
    found = tuple(row for row, label in zip(*test, strict=True) if label in own)
    if not found:
        raise DataError(
            f"{settings.test}: no rows with {settings.column} {min(own)!r}",
            f"client {name} needs at least one test row",
            "add some, or leave data.partition.test out",
        )
    return found


def _read(source: str, split: str, settings: PartitionConfig, columns: dict[str, str]) -> Labelled:
    records = list(read_records(source, split))
    rows = read_rows(records, columns, where=source)
    return rows, _labels(records, rows, settings, source)


def _labels(records: Sequence[Record], rows: Sequence[Row], settings: PartitionConfig, where: str) -> list[str]:
    """Return what each row is told apart by; nothing where the partition does not look at it."""
    if settings.by == "iid":
        return [""] * len(rows)
    if settings.column == "category":
        found = [_label(row.category) for row in rows]
    else:
        found = [_label(_cell(r, settings.column, f"{where}, row {n}")) for n, r in enumerate(records, 1)]
    empty = next((number for number, label in enumerate(found, 1) if not label), None)
    if empty is not None:
        raise DataError(
            f"{where}, row {empty}: {settings.column} is empty",
            f"data.partition by = {settings.by!r} needs it in every row",
            "fill it in, drop the row, or name another data.partition.column",
        )
    return found


def _label(text: str) -> str:
    """Return a category or an id as it is compared: what differs in blanks or in Unicode's form alone is one."""
    return " ".join(normal(regex.sub(r"\p{Default_Ignorable_Code_Point}", "", text)).split())


def _cell(record: Record, column: str, where: str) -> str:
    """Return a label as text; ids are often whole numbers."""
    if column not in record:
        raise DataError(
            f"{where}: no column {column!r} among {sorted(record)}",
            "data.partition.column must name one",
            "correct data.partition.column",
        )
    value = record[column]
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise DataError(
            f"{where}: {column} = {value!r}", "it must be text or a whole number", "write it as a string"
        )
    return "" if value is None else str(value)
