"""Every client's rows, from the source that the recipe names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from flexperts.config.data import ClientFiles, DataConfig
from flexperts.config.names import client_names, normal
from flexperts.data.folders import client_folders
from flexperts.data.holdout import check_disjoint, hold_out
from flexperts.data.partition import load_partition
from flexperts.data.records import DataTable, Record, Say, unsaid
from flexperts.data.rows import ClientRows, Row, read_rows
from flexperts.data.sources import read_source
from flexperts.data.tables import Given
from flexperts.errors import DataError, did_you_mean, shown

Clients = dict[str, ClientRows]
_Key = TypeVar("_Key", bound=str)
_Found = TypeVar("_Found")
_Made = TypeVar("_Made")
_SIDES: tuple[Literal["train"], Literal["test"]] = ("train", "test")
_NAMED = 5
"""Most clients that an error names."""


Refused = Callable[[DataError], None]


def raised(error: DataError) -> None:
    """Raise an error: one client's rows that break a rule stop the reading of all."""
    raise error


def load_clients(
    config: DataConfig, seed: int, say: Say = unsaid, refused: Refused = raised, given: Given | None = None
) -> Clients:
    """Read all clients' rows, sorted by client name.

    Args:
        config: The recipe's data section.
        seed: Seed of a partition, and of the train/test split where there is no test file.
        say: Called with one line per surprising finding, with client and file.
        refused: Called with an error of one client's files; where it returns, the others are read without it.
        given: Rows that a Python program has given.
    """
    if config.at_silos:
        raise DataError(
            "data.at_silos = true",
            "the silos read their own rows, and this machine has none",
            "run the recipe on a SuperLink (--engine superlink://NAME), or name a source of rows in it",
        )
    if config.silos:
        clients = _kept(_shipped(config), config)
    elif config.partition:
        clients = _kept(load_partition(config, seed, say), config)
    else:
        files = _in_folder(config.folder, config, say) if config.folder else config.clients
        names = client_names(files)  # an invalid name is refused before any file is read
        kept = _kept({names[name]: own for name, own in files.items()}, config)
        clients = each(
            kept, lambda name, its: _read(name, its, config.of_client(name), seed, say, refused, given), refused
        )
    clients = {name: clients[name] for name in sorted(clients)}
    if config.validation_fraction or config.validation_rows:
        clients = each(clients, lambda name, rows: _with_validation(rows, config, seed, name), refused)
    return clients


def each(
    found: Mapping[_Key, _Found], make: Callable[[_Key, _Found], _Made | None], refused: Refused
) -> dict[_Key, _Made]:
    """Return what a function makes of each item; without those that break a rule, where ``refused`` returns.

    Args:
        found: Client or split -> its files or rows.
        make: Gets both; where it returns None, it has called ``refused`` itself.
        refused: As for ``load_clients``.
    """
    made: dict[_Key, _Made] = {}
    for name, its in found.items():
        try:
            one = make(name, its)
        except DataError as error:
            refused(error)
        else:
            if one is not None:
                made[name] = one
    return made


def sources_of(config: DataConfig) -> Iterator[tuple[str | None, str, str]]:
    """Yield client (None for the clients of a partition), split and source of every file that is read."""
    if config.partition:
        pooled = {"train": config.partition.source, "test": config.partition.test}
        yield from ((None, side, source) for side, source in pooled.items() if source)
        return
    files = client_folders(Path(config.folder), unsaid) if config.folder else config.clients
    left = {normal(name) for name in config.leave_out or ()}
    for name, its in files.items():
        given = {side: source for side in _SIDES if (source := getattr(its, side)) is not None}
        if normal(name) not in left:
            yield from ((normal(name), side, source) for side, source in given.items())


def _in_folder(folder: str, config: DataConfig, say: Say) -> dict[str, ClientFiles]:
    """Return the files of every client in a folder; refuse settings of a client that is not there."""
    found = client_folders(Path(folder), say)
    known = {normal(name) for name in found}
    for name in config.clients:
        if normal(name) not in known:
            remedy = did_you_mean(name, known, "remove the section, or add the sub-folder with its train file")
            raise DataError(f"data.clients: {shown(name)}", f"{folder} has no such client", remedy)
    return found


def _kept(clients: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """Return the clients that the recipe does not leave out."""
    left = [normal(name) for name in config.leave_out or ()]
    for name in left:
        if name not in clients:
            named = ", ".join(sorted(clients)[:_NAMED])
            remedy = did_you_mean(name, clients, f"name one of its clients, such as {named}")
            raise DataError(
                f"data.leave_out or compare.newcomers: {shown(name)}", "the data has no such client", remedy
            )
    if len(set(left)) == len(clients):
        raise DataError(
            "data.leave_out and compare.newcomers", "they name all clients", "leave at least one client in the run"
        )
    return {name: its for name, its in clients.items() if name not in left}


def _with_validation(rows: ClientRows, config: DataConfig, seed: int, where: str) -> ClientRows:
    share, count, whole = config.validation_fraction, config.validation_rows, (*rows.train, *rows.test)
    if count is not None and 2 * count > len(rows.train):
        raise DataError(
            f"{where}: {len(rows.train)} train rows with data.validation_rows = {count}",
            "at most half of a client's train rows are held out",
            "lower data.validation_rows, add rows, or leave this client out",
        )
    sides = hold_out(rows.train, share, seed, where, "validation", count=count, whole=whole)
    return ClientRows(sides.train, rows.test, validation=sides.test)


def rows_hash(rows: ClientRows) -> str:
    """Return the SHA-256 of a client's rows, split by split."""
    sides = (rows.train, rows.test, *([rows.validation] if rows.validation else []))
    content = [[row.content for row in side] for side in sides]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def partition_manifest(clients: Clients) -> dict[str, Any]:
    """Return every client's row counts and SHA-256 hashes; category names are the only text in it.

    Returns:
        ``sha256`` of all clients, and ``clients``: for each name ``train_rows``, ``test_rows``,
        ``validation_rows``, ``categories`` (counts of train rows), ``train_sha256``, ``test_sha256``,
        ``validation_sha256``. The clients have a separate dictionary because a client may have any name, even
        ``sha256``.
    """
    entries = {name: _entry(clients[name]) for name in sorted(clients)}
    return {"sha256": manifest_hash(entries), "clients": entries}


def manifest_hash(entries: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all clients' entries of a manifest."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _entry(rows: ClientRows) -> dict[str, Any]:
    return {
        "train_rows": len(rows.train),
        "test_rows": len(rows.test),
        "validation_rows": len(rows.validation),
        "categories": dict(sorted(Counter(row.category for row in rows.train).items())),
        "train_sha256": rows_hash(ClientRows(rows.train, ())),
        "test_sha256": rows_hash(ClientRows((), rows.test)),
        "validation_sha256": rows_hash(ClientRows((), rows.validation)),
    }


def _shipped(config: DataConfig) -> Clients:
    from flexperts.data.silos.generate import SILOS, generate_chats, generate_silo

    assert config.silos is not None
    settings = config.silos
    generate: Callable[..., Mapping[str, Sequence[Mapping[str, Any]]]]
    generate = generate_silo if settings.turns == 1 else generate_chats
    made = {s: generate(s, settings.seed, settings.train_rows, settings.test_rows) for s in SILOS}
    return {
        silo: ClientRows(
            *(tuple(read_rows(_made(f"{silo} {side}", sides[side]), {})) for side in ("train", "test"))
        )
        for silo, sides in made.items()
    }


def _made(source: str, rows: Sequence[Mapping[str, Any]]) -> DataTable:
    return DataTable(
        source, list(rows[0]), lambda _: (Record(f"row {number}", row) for number, row in enumerate(rows, 1))
    )


def _read(
    name: str,
    files: ClientFiles,
    config: DataConfig,
    seed: int,
    say: Say,
    refused: Refused,
    given: Given | None,
) -> ClientRows | None:
    """Return one client's rows; both of its files are read, also if the first one is refused."""
    sources: dict[Literal["train", "test"], str]
    sources = {side: source for side in _SIDES if (source := getattr(files, side)) is not None}
    read = each(sources, lambda side, its: read_client_file(name, its, config, side, say, given), refused)
    if len(read) < len(sources):
        return None
    if "test" in read:
        return check_disjoint(ClientRows(tuple(read["train"]), tuple(read["test"])), name, say=say)
    return hold_out(read["train"], config.test_fraction, seed, name, say=say)


def read_client_file(
    name: str,
    source: str,
    config: DataConfig,
    split: Literal["train", "test"],
    say: Say = unsaid,
    given: Given | None = None,
) -> list[Row]:
    """Read one of a client's files; notices and errors name the client."""
    how: dict[str, Any] = {
        "split": split,
        "format": config.format,
        "on_bad_row": config.on_bad_row,
        "given": given,
    }
    try:
        return read_source(source, config.columns, **how, say=lambda text: say(f"{name}: {text}"))
    except DataError as error:
        remedy = error.remedy
        if config.folder or len(config.clients) > 1:
            alone = f"[data.columns] (for this client alone: [data.clients.{name}.columns])"
            remedy = remedy.replace("[data.columns]", alone)
        raise DataError(f"{name}: {error.value}", error.rule, remedy) from error
