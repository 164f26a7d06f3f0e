"""A client's copy of the shared weights, and requests that hold only what changed in them.

Copies are on the client's disk, in its own folder: the newest one and the one before, because an interrupted run
resumes at the start of a round, after which some clients may already have been evaluated. A copy is used only if
its digest is that of a version in the request, and what is rebuilt only if it has the newest version's digest; else
the client asks for all weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
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

_FORMAT = "flexperts-copy-1"
_SERVER = "server"
_SCHEMAS: Mapping[str, type[TrainRequest] | type[EvaluateRequest]] = {
    "train": TrainRequest,
    "evaluate": EvaluateRequest,
}


def with_weights(kind: str, content: RecordDict, client: Client) -> RecordDict | None:
    """Return a request with all weights, and keep them; None if the client has no copy that can be changed to them.

    Args:
        kind: The request's kind; others than train and evaluate are returned as they are.
        content: The request.
        client: The client that is asked.
    """
    settings = client.config.compression.down
    if settings.kind == "none" or kind not in _SCHEMAS:
        return content
    info = info_of(content)
    newest = client.folder / "copies" / f"{client.name}.safetensors"
    older = newest.parent / "before" / newest.name
    if VERSIONS not in info:
        if (payload := payload_of(content, _SERVER)).size:
            if newest.exists():
                move_file(newest, older)
            _write(newest, payload)
        return content
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
    if have < len(differences) or not path:
        if path == newest:
            move_file(newest, older)
        _write(newest, payload)
    return records(bare, payload=payload)


def _read(path: Path) -> Payload | None:
    """Return a copy; None if it cannot be read."""
    try:
        tensors, manifest = read_sealed(path, _FORMAT)
        return Payload(Manifest.from_json(manifest), tensors["shared"].numpy())
    except (FlexpertsError, KeyError, TypeError):
        return None


def _write(path: Path, payload: Payload) -> None:
    vector = torch.from_numpy(payload.vector.copy())  # a message's own memory is read-only
    write_sealed(path, _FORMAT, {"shared": vector}, payload.manifest.to_json())
