"""Counting what is really encoded: bytes of a message, and personal bytes found inside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from flexperts.communication.messages import DERIVED
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.parameters.vector import Manifest, Vector

_WINDOW = 1024
_SHORTEST = 16
CHUNK = 5 << 20
"""Size in bytes of Flower's chunks of an array."""
_NAME = 64
"""Number of letters in the name of one of Flower's objects."""
_VALUE = 4
"""Bytes of an fp32 value."""
_PARTS = {**dict.fromkeys(("experts", "graft", "common_graft", "gated", "mixture"), "experts"), "router": "routers"}
"""A part's name, the start of its tensors' names -> group; every other part is a separate group."""


def encoded_objects(content: RecordDict) -> Iterator[bytes]:
    """Yield the encoded objects that Flower's transport moves for this content, chunks included."""
    pending: list[Any] = [content]
    while pending:
        current = pending.pop()
        yield current.deflate()
        pending.extend((current.children or {}).values())


def encoded_bytes(content: RecordDict) -> int:
    """Return the size of a message's encoded content, in bytes, without encoding its values.

    Flower names every object by a hash of its content, which takes ten times as long as averaging the values. The
    size does not depend on the hashes unless two objects are equal: equal ones are sent once.
    """
    arrays = [array for record in content.array_records.values() for array in record.values()]
    if _may_repeat(arrays):
        return sum(map(len, encoded_objects(content)))
    return sum(map(len, encoded_objects(_without_values(content)))) + sum(map(_bytes_of_chunks, arrays))


def _without_values(content: RecordDict) -> RecordDict:
    """Return the same content with arrays that have no bytes."""
    bare = {
        name: ArrayRecord({n: Array(a.dtype, a.shape, a.stype, b"") for n, a in record.items()})
        for name, record in content.array_records.items()
    }
    return RecordDict({**content, **bare})


def _may_repeat(arrays: Sequence[Array]) -> bool:
    """Return whether two objects could be equal: arrays of one type and shape, or chunks with the same start."""
    kinds = {(array.dtype, array.shape, array.stype) for array in arrays}
    starts = [array.data[at : at + _SHORTEST] for array in arrays for at in range(0, len(array.data), CHUNK)]
    return len(kinds) < len(arrays) or len(set(starts)) < len(starts)


def _bytes_of_chunks(array: Array) -> int:
    """Return the bytes that an array's data add to its encoding.

    Each object is ``TYPE CHILDREN LENGTH-OF-BODY``, a zero byte, then the body.
    """
    size, fields = len(array.data), {"dtype": array.dtype, "shape": array.shape, "stype": array.stype}
    chunks = [min(CHUNK, size - at) for at in range(0, size, CHUNK)]
    children = ",".join(["x" * _NAME] * len(chunks))
    with_data = json.dumps(fields | {"arraychunk_ids": [*range(len(chunks))]})
    without = json.dumps(fields | {"arraychunk_ids": []})
    own = len(f"Array {children} {len(with_data)}\0{with_data}") - len(f"Array  {len(without)}\0{without}")
    return own + sum(len(f"ArrayChunk  {chunk}\0") + chunk for chunk in chunks)


def personal_bytes(content: RecordDict, personal: Mapping[str, Tensor], *before: Vector) -> int:
    """Return how many bytes of personal tensors occur in a message's encoding; anything but 0 is a fault.

    Every personal tensor's first kilobyte, from its first byte that is not zero, is searched for in the encoded
    objects, with arrays whole instead of in Flower's chunks. Fewer than 16 remaining bytes are not searched for: a
    single gate bias often equals one of a million shared weights by chance.

    Args:
        content: The message.
        personal: What must not be in it.
        before: Vectors before noise or packing, which hide personal bytes; they are searched too.
    """
    whole = [array.data for record in content.array_records.values() for array in record.values()]
    others = encoded_objects(_without_values(content))
    encoded = b"".join([*others, *whole, *(vector.tobytes() for vector in before)])
    found = 0
    for parameter in personal.values():
        window = _window(parameter)
        if len(window) >= _SHORTEST and window in encoded:
            found += parameter.nbytes
    return found


def _window(tensor: Tensor) -> bytes:
    """Return a tensor's first kilobyte from its first byte that is not zero, without reading more than needed."""
    flat, start, length = tensor.detach().reshape(-1), 0, 2 * _WINDOW
    while start < len(flat):
        read = _bytes(flat[start : start + length])
        if window := read.lstrip(b"\0"):
            if len(window) < _WINDOW:  # the rest of it is in the values after these
                first = start + (len(read) - len(window)) // flat.itemsize
                window = _bytes(flat[first : first + 2 * _WINDOW]).lstrip(b"\0")
            return window[:_WINDOW]
        start, length = start + length, 2 * length
    return b""


def _bytes(values: Tensor) -> bytes:
    return values.cpu().view(torch.uint8).numpy().tobytes()


def mean_groups(rounds: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, float]:
    """Return mean bytes by tensor group over the payloads of rounds that hold values; empty without any."""
    payloads = [groups for clients in rounds for groups in clients.values() if any(groups.values())]
    names = sorted({name for groups in payloads for name in groups})
    return {name: sum(groups.get(name, 0) for groups in payloads) / len(payloads) for name in names}


def mean_with_weights(messages: Iterable[tuple[int, int]]) -> float:
    """Return the mean size of the messages that hold weights; if none does, of all; 0 without messages.

    Args:
        messages: Size and payload bytes of each.
    """
    found = list(messages)
    counted = [size for size, payload in found if payload] or [size for size, _ in found]
    return sum(counted) / max(1, len(counted))


def payload_bytes(manifest: Manifest) -> int:
    """Return the size of a payload in bytes: its fp32 values, without Flower's wrapping."""
    return _VALUE * manifest.size


def group_bytes(manifest: Manifest) -> dict[str, int]:
    """Return a payload's bytes by tensor group, sorted by group; they add up to ``payload_bytes``.

    Groups: ``attention LoRA A`` and ``B``; ``experts`` (whole or low-rank, grafted or in place), ``routers``,
    ``gates``; ``derived WORD`` for what a method computes besides parameters, by the first word of its name; any
    other part under its own name.
    """
    sizes: dict[str, int] = {}
    for name, shape in zip(manifest.names, manifest.shapes, strict=True):
        group = tensor_group(name)
        sizes[group] = sizes.get(group, 0) + _VALUE * prod(shape)
    return dict(sorted(sizes.items()))


def tensor_group(name: str) -> str:
    """Return the group of a tensor, from its name in a payload; see ``group_bytes``."""
    if name.startswith(DERIVED):
        return f"derived {name.removeprefix(DERIVED).split('.')[0].replace('_', ' ')}"
    if name.startswith(SHARED_PREFIX):
        return f"attention LoRA {'A' if '.lora_A.' in name else 'B'}"
    part, *words = name.split(".")
    if any(word == "gate" or word.startswith("graft_gate") for word in words):
        return "gates"
    # The projection that chooses among a mixture's experts counts as a router.
    return "routers" if words[-1:] in (["projection"], ["router"]) else _PARTS.get(part, part)
