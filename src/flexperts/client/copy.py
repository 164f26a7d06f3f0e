"""A client's copy of the shared weights, and requests that hold only what changed in them.

The copy is on the client's disk, in its own folder. It is used only if its digest is that of a version in the
request, and what is rebuilt only if it has the newest version's digest; else the client asks for all weights.
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
    path = client.folder / "copies" / f"{client.name}.safetensors"
    if VERSIONS not in info:
        if (payload := payload_of(content, _SERVER)).size:
            _write(path, payload)
        return content
    digests, differences = differences_of(content, _SERVER)
    bare = {name: value for name, value in info.items() if name != VERSIONS}
    asked = fields_of(records(bare), _SCHEMAS[kind], _SERVER)
    payload = _copy(path, asked.agreement, client)
    if (digest := payload.digest()) not in digests:
        return None
    have = digests.index(digest)
    for packed in differences[have:]:
        change = unpack(packed, payload.size, settings, _SERVER)
        payload = replace(payload, vector=payload.vector + change)
    if have < len(differences) and payload.digest() != digests[-1]:
        return None
    if have < len(differences) or not path.exists():
        _write(path, payload)
    return records(bare, payload=payload)


def _copy(path: Path, agreement: str, client: Client) -> Payload:
    """Return the client's copy; without one that can be read, the initial weights."""
    try:
        tensors, manifest = read_sealed(path, _FORMAT)
        return Payload(Manifest.from_json(manifest), tensors["shared"].numpy())
    except (FlexpertsError, KeyError, TypeError):
        return client.initial(json.loads(agreement))[0]


def _write(path: Path, payload: Payload) -> None:
    vector = torch.from_numpy(payload.vector.copy())  # a message's own memory is read-only
    write_sealed(path, _FORMAT, {"shared": vector}, payload.manifest.to_json())
