"""One pooled instruction set, divided over clients by name: every row goes to exactly one of them.

Where the recipe names no test file, each client holds out ``data.test_fraction`` of its own passages. A test file
is shared. With ``pathological`` and ``natural`` a client is scored on the test rows of its own categories or id;
clients that share a category share its test rows. With ``iid`` and ``dirichlet``, where clients have no fixed kind
of row, each is scored on all of them. A passage may stand with several clients, but never on both sides of one.
"""

from __future__ import annotations

from flexperts.config.data import DataConfig, PartitionConfig
from flexperts.data.bad_rows import BadRow, settle_bad_rows
from flexperts.data.columns import possible_columns
from flexperts.data.holdout import check_disjoint, split_rows
from flexperts.data.partitioners import Shares, assign
from flexperts.data.records import Say, unsaid
from flexperts.data.rows import ClientRows, Label, Row, read_labelled
from flexperts.data.sources import open_table
from flexperts.errors import DataError

Labelled = tuple[list[Row], list[str]]
_SHARED_TEST = ("iid", "dirichlet")
_SAID = 3
"""Lines about clients, of whom there may be thousands."""


def load_partition(config: DataConfig, seed: int, say: Say = unsaid) -> dict[str, ClientRows]:
    """Read the pooled rows and divide them as ``config.partition`` says.

    Args:
        config: A data section with a partition.
        seed: The run's seed.
        say: Gets what may be right but surprises, a line each.

    Raises:
        DataError: A file breaks a rule, a row has no label, the rows cannot be divided so that every client gets
            ``min_rows`` of them, or a client would have no test rows.
    """
    settings = config.partition
    assert settings is not None
    rows, labels = _read(settings.source, "train", config, say)
    shares = assign(labels, settings, seed, say=say)
    said: list[str] = []
    if settings.test is None:
        divided = {
            name: split_rows([rows[i] for i in share], config.test_fraction, seed, name, say=said.append)
            for name, share in shares.items()
        }
    else:
        test = _of_clients(_read(settings.test, "test", config, say), {*labels}, config, say)
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
    return {name: _of(name, {labels[i] for i in share}, test, settings) for name, share in shares.items()}


def _of(name: str, own: set[str], test: Labelled, settings: PartitionConfig) -> tuple[Row, ...]:
    found = tuple(row for row, label in zip(*test, strict=True) if label in own)
    if not found:
        raise DataError(
            f"{settings.test}: no rows of client {name}, by {settings.column}",
            "each client needs at least one test row",
            "add some, or leave data.partition.test out",
        )
    return found


def _of_clients(test: Labelled, known: set[str], config: DataConfig, say: Say) -> Labelled:
    """Return the test rows whose label some client trains on; the others are bad rows."""
    settings = config.partition
    assert settings is not None
    assert settings.test is not None
    if settings.by in ("iid", "dirichlet"):
        return test
    strange = [
        BadRow(row.where, f"its {settings.column} is none that a client trains on", "each test row has a client")
        for row, label in zip(*test, strict=True)
        if label not in known
    ]
    settle_bad_rows(settings.test, strange, len(test[0]), config.on_bad_row, say)
    kept = [(row, label) for row, label in zip(*test, strict=True) if label in known]
    return [row for row, _ in kept], [label for _, label in kept]


def _read(source: str, split: str, config: DataConfig, say: Say) -> Labelled:
    """Read rows and the label of each; nothing where the partition does not look at it."""
    settings = config.partition
    assert settings is not None
    label = Label(settings.column, f"data.partition by = {settings.by!r} needs it in every row")
    table = open_table(source, {*possible_columns(config.columns), settings.column}, split, say)
    by = None if settings.by == "iid" else label
    return read_labelled(table, config.columns, by, on_bad_row=config.on_bad_row, say=say)
