"""Checks that rows are the same as when a run started, by counts and hashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexperts.data.clients import Clients, manifest_hash, partition_manifest
from flexperts.errors import DataError
from flexperts.files import damaged, mapping, read_json

Entries = Mapping[str, Mapping[str, Any]]
"""Client -> its entry in a partition's manifest."""
_SIDES = ("train", "test", "validation")
_MOST_TOLD = 4


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return the clients' entries of a ``partition.json``."""
    found = mapping(path, read_json(path))
    entries = mapping(path, found.get("clients"))
    if found.get("sha256") != manifest_hash(entries):
        raise damaged(path, "its checksum does not match")
    return {name: mapping(path, entry) for name, entry in entries.items()}


def check_unchanged(before: Entries, clients: Clients, rule: str) -> None:
    """Refuse rows that differ from an earlier manifest.

    Args:
        before: The earlier manifest's entries.
        clients: The present rows.
        rule: What keeps the earlier rows, for the message.
    """
    now = partition_manifest(clients)["clients"]
    changes = [
        *(f"{name} is new" for name in sorted(now.keys() - before.keys())),
        *(f"{name} is missing" for name in sorted(before.keys() - now.keys())),
        *(
            f"{n}: {', '.join(c)}"
            for n in sorted(now.keys() & before.keys())
            if (c := [*_changes(before[n], now[n])])
        ),
    ]
    if changes:
        more = [f"and {len(changes) - _MOST_TOLD} more silos"] if changes[_MOST_TOLD:] else []
        raise DataError(
            "; ".join([*changes[:_MOST_TOLD], *more]),
            rule,
            "restore the rows, or start a new run with these",
        )


def check_same_rows(manifest: Path, clients: Clients) -> None:
    """Refuse rows that differ from those with which a run started; see ``check_unchanged``.

    Args:
        manifest: The run's ``partition.json``.
        clients: The present rows.
    """
    rule = f"the run in {manifest.parent} started with other rows; a run keeps its rows and their split"
    check_unchanged(read_manifest(manifest), clients, rule)


def has_rows(entry: Mapping[str, Any], side: str, sha256: str) -> bool:
    """Return whether a hash is that of one split of a client's rows."""
    return bool(entry.get(f"{side}_sha256") == sha256)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences, one per split."""
    for side in _SIDES:
        old, new = before.get(f"{side}_rows", 0), now[f"{side}_rows"]
        if old != new:
            yield f"{side} {old} rows before, {new} now"
        elif (
            before.get(hashed := f"{side}_sha256", now[hashed]) != now[hashed]
        ):  # manifests of earlier versions have fewer hashes
            yield f"{side} {old} rows as before, but not the same ones"
