"""A client's copy of the shared weights, and requests that hold only what changed in them.

Copies are on the client's disk, in its own folder: the newest one and the one before, because an interrupted run
resumes at the start of a round, after which some clients may already have been evaluated. A copy is used only if
its digest is that of a version in the request, and what is rebuilt only if it has the newest version's digest; else
the client asks for all weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import RecordDict

from flexperts.checked_file import read_sealed, write_sealed
from flexperts.client.client import Client
from flexperts.communication.compression import unpack
from flexperts.communication.messages import (
    VERSIONS,
    differences_of,
    fields_of,
    info_of,
    payload_of,
    records,
)
from flexperts.communication.schema import EvaluateRequest, TrainRequest
from flexperts.errors import FlexpertsError
from flexperts.files import move_file
from flexperts.parameters.vector import Manifest, Payload

Keep = Callable[[], None]
_FORMAT = "flexperts-copy-1"
_SERVER = "server"
_SCHEMAS: Mapping[str, type[TrainRequest] | type[EvaluateRequest]] = {
    "train": TrainRequest,
    "evaluate": EvaluateRequest,
}


def with_weights(kind: str, content: RecordDict, client: Client) -> tuple[RecordDict, Keep] | None:
    """Return a request with all weights, and what keeps them; None if the client has no copy to change to them.

    They are kept when the request has been answered: one that is refused must not replace the copies.

    Args:
        kind: The request's kind; others than train and evaluate are returned as they are.
        content: The request.
        client: The client that is asked.
    """
    settings = client.config.compression.down
    if settings.kind == "none" or kind not in _SCHEMAS:
        return content, _nothing
    info = info_of(content)
    newest = client.folder / "copies" / f"{client.name}.safetensors"
    older = newest.parent / "before" / newest.name
    if VERSIONS not in info:
        payload = payload_of(content, _SERVER)
        return content, partial(_keep, newest, payload, older) if payload.size else _nothing
    digests, differences = differences_of(content, _SERVER)
    bare = {name: value for name, value in info.items() if name != VERSIONS}
    asked = fields_of(records(bare), _SCHEMAS[kind], _SERVER)
    for path in (newest, older, None):
        copy = _read(path) if path else client.initial(json.loads(asked.agreement))[0]
        if copy is not None and (digest := copy.digest()) in digests:
            payload, have = copy, digests.index(digest)
            break
    else:
        return None
    for packed in differences[have:]:
        change = unpack(packed, payload.size, settings, _SERVER)
        payload = replace(payload, vector=payload.vector + change)
    if have < len(differences) and payload.digest() != digests[-1]:
        return None
    is_new = have < len(differences) or not path
    keep = partial(_keep, newest, payload, older if path == newest else None) if is_new else _nothing
    return records(bare, payload=payload), keep


def _keep(newest: Path, payload: Payload, older: Path | None) -> None:
    """Write a copy; the one that it replaces becomes the older one, if that is named."""
    if older is not None and newest.exists():
        move_file(newest, older)
    vector = torch.from_numpy(payload.vector.copy())  # a message's own memory is read-only
    write_sealed(newest, _FORMAT, {"shared": vector}, payload.manifest.to_json())


def _nothing() -> None:
    """Keep nothing."""


def _read(path: Path) -> Payload | None:
    """Return a copy; None if it cannot be read."""
    try:
        tensors, manifest = read_sealed(path, _FORMAT)
        return Payload(Manifest.from_json(manifest), tensors["shared"].numpy())
    except (FlexpertsError, KeyError, TypeError):
        return None
