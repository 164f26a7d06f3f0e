"""Counting what is really encoded: bytes of a message, and personal bytes found inside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from flwr.app import RecordDict

from flexperts.parameters.split import Parameters

_WINDOW = 1024
_SHORTEST = 16


def encoded_objects(content: RecordDict) -> Iterator[bytes]:
    """Yield the encoded objects that Flower's transport moves for this content, chunks included."""
    pending: list[Any] = [content]
    while pending:
        current = pending.pop()
        yield current.deflate()
        pending.extend((current.children or {}).values())


def encoded_bytes(content: RecordDict) -> int:
    """Return the size of a message's encoded content, in bytes."""
    return sum(len(part) for part in encoded_objects(content))


def personal_bytes(content: RecordDict, personal: Parameters) -> int:
    """Return how many bytes of personal tensors occur in a message's encoding: 0, or something is wrong.

    Every personal tensor's first kilobyte, from its first byte that is not zero, is searched for in the encoded
    objects. What is left of under 16 bytes says nothing and is passed over: among a million shared weights, one is
    often equal to a lone gate bias by chance.
    """
    # The arrays whole as well: what is sent is cut into chunks, and a cut could fall into the window.
    whole = [array.data for record in content.array_records.values() for array in record.values()]
    encoded = b"".join([*encoded_objects(content), *whole])
    found = 0
    for parameter in personal.values():
        raw = parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        window = raw.lstrip(b"\0")[:_WINDOW]
        if len(window) >= _SHORTEST and window in encoded:
            found += len(raw)
    return found
