"""Every client's rows, from the source that the recipe names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from flexperts.config.data import ClientFiles, DataConfig
from flexperts.config.names import client_names, normal
from flexperts.data.folders import client_folders
from flexperts.data.holdout import check_disjoint, hold_out
from flexperts.data.partition import load_partition
from flexperts.data.records import DataTable, Record, Say, unsaid
from flexperts.data.rows import ClientRows, Row, read_rows
from flexperts.data.sources import read_source
from flexperts.errors import DataError, did_you_mean, shown

Clients = dict[str, ClientRows]
_NAMED = 5
"""Most clients that an error names."""


def load_clients(config: DataConfig, seed: int, say: Say = unsaid) -> Clients:
    """Read all clients' rows, sorted by client name.

    Args:
        config: The recipe's data section.
        seed: Seed of a partition, and of the train/test split where there is no test file.
        say: Called with one line per surprising finding, with client and file.
    """
    if config.at_silos:
        raise DataError(
            "data.at_silos = true",
            "the silos read their own rows, and this machine has none",
            "run the recipe on a SuperLink (--engine superlink://NAME), or name a source of rows in it",
        )
    if config.silos:
        clients = _kept(_shipped(config), config)
    elif config.folder:
        clients = _read(client_folders(Path(config.folder), say), config, seed, say)
    elif config.partition:
        clients = _kept(load_partition(config, seed, say), config)
    else:
        clients = _read(config.clients, config, seed, say)
    clients = {name: clients[name] for name in sorted(clients)}
    if not (config.validation_fraction or config.validation_rows):
        return clients
    return {name: _with_validation(rows, config, seed, name) for name, rows in clients.items()}


def _read(files: Mapping[str, ClientFiles], config: DataConfig, seed: int, say: Say) -> Clients:
    names = client_names(files)  # an invalid name is refused before any file is read
    kept = _kept({names[n]: own for n, own in files.items()}, config)
    return {name: _files(name, own, config, seed, say) for name, own in kept.items()}


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
    content = [[_content(row) for row in side] for side in sides]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


_ALWAYS = ("instruction", "response", "context", "category", "passage")


def _content(row: Row) -> list[Any]:
    """Return a row's content; of the fields that came later only those that are set, so that old hashes hold."""
    later = {f.name: getattr(row, f.name) for f in fields(row) if f.compare and f.name not in _ALWAYS}
    given = {name: value for name, value in later.items() if value}
    return [*(getattr(row, name) for name in _ALWAYS), *([given] if given else [])]


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
    from flexperts.data.silos.generate import SILOS, generate_silo

    assert config.silos is not None
    settings = config.silos
    made = {s: generate_silo(s, settings.seed, settings.train_rows, settings.test_rows) for s in SILOS}
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


def _files(name: str, files: ClientFiles, config: DataConfig, seed: int, say: Say) -> ClientRows:
    train = read_client_file(name, files.train, config, "train", say)
    if files.test is None:
        return hold_out(train, config.test_fraction, seed, name, say=say)
    test = read_client_file(name, files.test, config, "test", say)
    return check_disjoint(ClientRows(tuple(train), tuple(test)), name, say=say)


def read_client_file(
    name: str, source: str, config: DataConfig, split: Literal["train", "test"], say: Say = unsaid
) -> list[Row]:
    """Read one of a client's files; notices and errors name the client."""
    how: dict[str, Any] = {"split": split, "on_bad_row": config.on_bad_row}
    try:
        return read_source(source, config.columns, **how, say=lambda text: say(f"{name}: {text}"))
    except DataError as error:
        raise DataError(f"{name}: {error.value}", error.rule, error.remedy) from error
