"""Partitions of one pooled instruction set: every row goes to exactly one client.

Without a test file, each client holds out ``data.test_fraction`` of its passages. A test file is shared. With
``pathological`` and ``natural`` a client is scored on the test rows of its categories or id; clients that share a
category share its test rows. With ``iid`` and ``dirichlet`` clients have no fixed kind of row, and each is scored
on all test rows. Several clients may have the same passage, but no client has it in both splits.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from flexperts.config.data import DataConfig, PartitionConfig
from flexperts.config.names import client_names, file_safe
from flexperts.data.bad_rows import BadRow, settle_bad_rows
from flexperts.data.formats import possible_columns
from flexperts.data.holdout import check_disjoint, hold_out
from flexperts.data.records import Say, unsaid
from flexperts.data.rows import ClientRows, Label, Row, read_labelled
from flexperts.data.sources import open_table
from flexperts.errors import DataError, optional
from flexperts.seeding import derive_seed

Labelled = tuple[list[Row], list[str]]
_SHARED_TEST = ("iid", "dirichlet")
_SAID = 3
"""Most lines about single clients; there may be thousands of clients."""


def load_partition(config: DataConfig, seed: int, say: Say = unsaid) -> dict[str, ClientRows]:
    """Read the pooled rows and divide them as ``config.partition`` says.

    Args:
        config: A data section with a partition.
        seed: The run's seed.
        say: Called with one line per surprising finding.
    """
    settings = config.partition
    assert settings is not None
    rows, labels = _read(settings.source, "train", config, say)
    shares = assign(labels, settings, seed, say=say)
    said: list[str] = []
    if settings.test is None:
        divided = {
            name: hold_out([rows[i] for i in share], config.test_fraction, seed, name, say=said.append)
            for name, share in shares.items()
        }
    else:
        test = _of_clients(_read(settings.test, "test", config, say), {*labels}, config, say)
        tests = _tests(shares, labels, test, settings)
        divided = {n: ClientRows(tuple(rows[i] for i in share), tests[n]) for n, share in shares.items()}
        if settings.by in _SHARED_TEST:  # all clients have the same test rows: one check is enough
            check_disjoint(ClientRows(tuple(rows), tuple(test[0])), settings.source, say=said.append)
        else:
            divided = {n: check_disjoint(own, n, say=said.append) for n, own in divided.items()}
    for text in said[:_SAID]:
        say(text)
    if more := len(said) - _SAID if len(said) > _SAID else 0:
        say(f"{settings.source}: {more} more such lines, about other clients")
    return divided


def _tests(
    shares: Shares, labels: list[str], test: Labelled, settings: PartitionConfig
) -> dict[str, tuple[Row, ...]]:
    """Return every client's rows from the shared test file."""
    if settings.by in _SHARED_TEST:
        return dict.fromkeys(shares, tuple(test[0]))
    return {name: _of(name, {labels[i] for i in share}, test, settings) for name, share in shares.items()}


def _of(name: str, own: set[str], test: Labelled, settings: PartitionConfig) -> tuple[Row, ...]:
    found = tuple(row for row, label in zip(*test, strict=True) if label in own)
    if not found:
        raise DataError(
            f"{settings.test}: no rows of client {name}, by {settings.column}",
            "each client needs at least one test row",
            "add test rows for this client, or remove data.partition.test",
        )
    return found


def _of_clients(test: Labelled, known: set[str], config: DataConfig, say: Say) -> Labelled:
    """Return the test rows whose label occurs in the train rows; the others are bad rows."""
    settings = config.partition
    assert settings is not None
    assert settings.test is not None
    if settings.by in ("iid", "dirichlet"):
        return test
    strange = [
        BadRow(row.where, f"its {settings.column} occurs in no train row", "each test row must belong to a client")
        for row, label in zip(*test, strict=True)
        if label not in known
    ]
    settle_bad_rows(settings.test, strange, len(test[0]), config.on_bad_row, say)
    kept = [(row, label) for row, label in zip(*test, strict=True) if label in known]
    return [row for row, _ in kept], [label for _, label in kept]


def _read(source: str, split: str, config: DataConfig, say: Say) -> Labelled:
    """Read rows and the label of each; labels are empty where the partition does not use them."""
    settings = config.partition
    assert settings is not None
    label = Label(settings.column, f"data.partition by = {settings.by!r} needs it in every row")
    table = open_table(source, {*possible_columns(config.columns), settings.column}, split, say)
    by = None if settings.by == "iid" else label
    how: dict[str, Any] = {"format": config.format, "on_bad_row": config.on_bad_row}
    return read_labelled(table, config.columns, by, **how, say=say)


Shares = dict[str, list[int]]


def assign(labels: Sequence[str], settings: PartitionConfig, seed: int, *, say: Say = unsaid) -> Shares:
    """Divide rows over clients: every row goes to exactly one.

    Args:
        labels: One per row: its category, or its client's id. ``iid`` does not use them.
        settings: How to divide.
        seed: The run's seed. It decides on the rows, not on which client has which category or id.
        say: Called with one line per surprising finding.

    Returns:
        Client name -> row numbers from 0, shuffled.
    """
    kinds = sorted(set(labels))
    numbers = {kind: number for number, kind in enumerate(kinds)}
    _check_size(len(labels), settings)
    merged = _categories_per_label(len(kinds), settings)
    codes = [numbers[label] // merged for label in labels]
    shares = _divide(codes, settings, settings.categories_per_client // merged, derive_seed(seed, "partition"))
    names = _names(kinds, len(shares), settings, say)
    return dict(zip(names, _checked(shares, len(labels), settings), strict=True))


def _check_size(rows: int, settings: PartitionConfig) -> None:
    clients = settings.clients or 1
    if rows < clients * settings.min_rows:
        raise DataError(
            f"{settings.source}: {rows} rows for {clients} clients",
            f"each needs data.partition.min_rows = {settings.min_rows}, so {clients * settings.min_rows} in all",
            "lower data.partition.clients or min_rows, or add rows",
        )


def _categories_per_label(categories: int, settings: PartitionConfig) -> int:
    """Return how many categories share a label, so that the partitioner uses all categories."""
    clients, each = settings.clients or 1, settings.categories_per_client
    if settings.by != "pathological":
        return 1
    if clients * each == categories:
        return each
    if each > categories or clients + each <= categories:
        raise DataError(
            f"data.partition: {clients} clients with {each} of {categories} categories each",
            "all categories must be used, and no client can have more categories than exist",
            f"choose clients x categories_per_client = {categories}, or their sum above {categories}",
        )
    return 1


def _divide(codes: list[int], settings: PartitionConfig, each: int, seed: int) -> list[list[int]]:
    """Return every partition's row numbers; ``each`` is the number of labels per client (pathological)."""
    import numpy
    from datasets import Dataset

    with optional("partition", "data.partition"):
        from flwr_datasets import partitioner as partitioners

    order: list[int] = numpy.random.default_rng(derive_seed(seed, "order")).permutation(len(codes)).tolist()
    try:
        with _quiet():
            partitioner = _partitioner(partitioners, settings, each, seed)
            partitioner.dataset = Dataset.from_dict({"row": order, "label": [codes[i] for i in order]})
            return [list(partitioner.load_partition(n)["row"]) for n in range(partitioner.num_partitions)]
    except ValueError as error:
        raise DataError(
            f"{settings.source}: {len(codes)} rows, data.partition by = {settings.by!r}",
            f"no division found that gives {settings.clients} clients {settings.min_rows} rows each",
            "lower data.partition.clients or min_rows, raise data.partition.alpha, or change the seed"
            if settings.by == "dirichlet"
            else "lower data.partition.clients or categories_per_client, or add rows",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence flwr-datasets: a warning per redrawn division, divisions by zero at small alpha, a progress bar."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _partitioner(partitioners: Any, settings: PartitionConfig, each: int, seed: int) -> Any:
    clients = settings.clients or 1
    if settings.by == "natural":
        return partitioners.NaturalIdPartitioner("label")
    if settings.by == "iid":
        return partitioners.IidPartitioner(clients)
    if settings.by == "dirichlet":
        return partitioners.DirichletPartitioner(
            clients, "label", settings.alpha, settings.min_rows, self_balancing=True, seed=seed
        )
    return partitioners.PathologicalPartitioner(clients, "label", each, "deterministic", seed=seed)


def _checked(shares: list[list[int]], rows: int, settings: PartitionConfig) -> list[list[int]]:
    """Return ``shares`` if they contain every row once and are large enough."""
    if sorted(chain(*shares)) != list(range(rows)):
        raise DataError(
            f"data.partition by = {settings.by!r}",
            "flwr-datasets left rows out or assigned them twice",
            "choose another data.partition.by, and report this as an issue",
        )
    if (smallest := min(map(len, shares))) < settings.min_rows:
        raise DataError(
            f"{settings.source}: a client with {smallest} rows, data.partition by = {settings.by!r}",
            f"each needs data.partition.min_rows = {settings.min_rows}",
            "lower data.partition.min_rows, add rows, or choose another data.partition.by",
        )
    return shares


def _names(kinds: list[str], clients: int, settings: PartitionConfig, say: Say) -> list[str]:
    """Return the clients' names: ids, categories where each client has exactly one, else numbers."""
    named = [file_safe(kind) for kind in kinds]
    if settings.by == "natural":
        _check_names(named, kinds, settings)
    elif not (settings.by == "pathological" and settings.categories_per_client == 1 and _are_names(named, clients)):
        width = max(2, len(str(clients)))
        return [f"client-{number:0{width}}" for number in range(1, clients + 1)]
    if other := [(kind, name) for kind, name in zip(kinds, named, strict=True) if kind != name]:
        told = f"such as {other[0][0]!r} to {other[0][1]!r}"
        say(f"{settings.source}: {len(other)} of {len(kinds)} names are changed to valid client names, {told}")
    return named


def _are_names(named: list[str], clients: int) -> bool:
    try:
        return len(named) == clients and len(client_names(named)) == clients
    except DataError:
        return False


def _check_names(named: list[str], kinds: list[str], settings: PartitionConfig) -> None:
    owner: dict[str, str] = {}
    for name, kind in zip(named, kinds, strict=True):
        if name in owner:
            raise DataError(
                f"{settings.source}: {settings.column} {owner[name]!r} and {kind!r}",
                f"both would be the client {name!r} (a name is letters, digits, '-', '_', '.')",
                f"rename one of them in the column {settings.column}",
            )
        owner[name] = kind
    client_names(named)
