"""Every client's rows, from whichever source the recipe names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from flexperts.config.data import ClientFiles, DataConfig
from flexperts.data.partition import load_partition
from flexperts.data.rows import ClientRows, read_rows
from flexperts.data.sources import check_disjoint, read_source, split_rows
from flexperts.errors import DataError

Clients = dict[str, ClientRows]

_LONGEST_NAME = 200
"""Bytes of a client's name: with what is put around it, it is a file's name, which most systems end at 255."""


def load_clients(config: DataConfig, seed: int) -> Clients:
    """Read all clients' rows, sorted by client name.

    Args:
        config: The recipe's data section.
        seed: Seed of a partition, and of the train/test split where there is no test file.

    Raises:
        DataError: A file is missing or breaks a rule, a split is empty, a test passage is trained on, a pooled data
            set cannot be divided as the recipe says, or the rows are at silos and not here.
    """
    if config.at_silos:
        raise DataError(
            "data.at_silos = true",
            "every silo reads its own rows, and there are none here",
            "run it on a SuperLink (--engine superlink://NAME), or name a source of rows",
        )
    if config.silos:
        clients = _shipped(config)
    elif config.folder:
        clients = {n: _files(n, f, config, seed) for n, f in _folder(Path(config.folder)).items()}
    elif config.partition:
        clients = load_partition(config, seed)
    else:
        clients = {n: _files(n, f, config, seed) for n, f in config.clients.items()}
    checked = {client_name(n): check_disjoint(clients[n], n) for n in sorted(clients)}
    share = config.validation_fraction
    return {n: _with_validation(rows, share, seed, n) for n, rows in checked.items()} if share else checked


def _with_validation(rows: ClientRows, share: float, seed: int, where: str) -> ClientRows:
    sides = split_rows(rows.train, share, seed, where, "validation")
    return ClientRows(sides.train, rows.test, validation=sides.test)


def rows_hash(rows: ClientRows) -> str:
    """Return a SHA-256 that names a client's rows, side by side."""
    sides = (rows.train, rows.test, *([rows.validation] if rows.validation else []))
    # The last field says where a row came from, and is no part of it.
    content = [[astuple(row)[:-1] for row in side] for side in sides]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def partition_manifest(clients: Clients) -> dict[str, Any]:
    """Return who has which rows, in counts (rows) and SHA-256 hashes, without any text but the categories' names.

    Returns:
        ``sha256`` of all clients, and ``clients``: for each name ``train_rows``, ``test_rows``, ``categories``
        (which counts train rows), ``train_sha256``, ``test_sha256``, ``validation_sha256``. The clients stand in a
        dictionary of their own, as any name may be a client's.
    """
    entries = {name: _entry(clients[name]) for name in sorted(clients)}
    return {"sha256": manifest_hash(entries), "clients": entries}


def manifest_hash(entries: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all clients' entries of a manifest."""
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
        silo: ClientRows(*(tuple(read_rows(sides[side], {}, where=f"{silo} {side}")) for side in ("train", "test")))
        for silo, sides in made.items()
    }


def _folder(folder: Path) -> dict[str, ClientFiles]:
    found = {p.parent.name: p for p in folder.glob("*/train.jsonl")}
    if not found:
        raise DataError(
            f"data.folder = {folder}",
            "it must hold <client>/train.jsonl files",
            "see `flexperts data make-silos`",
        )
    tests = {name: path.with_name("test.jsonl") for name, path in found.items()}
    return {
        n: ClientFiles(train=str(p), test=str(tests[n]) if tests[n].exists() else None) for n, p in found.items()
    }


def _files(name: str, files: ClientFiles, config: DataConfig, seed: int) -> ClientRows:
    train = read_source(files.train, config.columns)
    if files.test is None:
        return split_rows(train, config.test_fraction, seed, name)
    return ClientRows(tuple(train), tuple(read_source(files.test, config.columns, split="test")))


def client_name(name: str) -> str:
    """Return a client's name if it can be a file's name.

    Raises:
        DataError: It cannot.
    """
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise DataError(f"client {name[:100]!r}", "a client's name is letters, digits, '-', '_', '.'", "rename it")
    if (size := len(name.encode())) > _LONGEST_NAME:  # file systems count bytes
        raise DataError(
            f"client {name[:40]!r}... of {size} bytes", f"a name has at most {_LONGEST_NAME} bytes", "rename it"
        )
    return name
