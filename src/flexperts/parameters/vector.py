"""Shared parameters as one flat fp32 vector, and a manifest of the tensors in it.

One vector instead of many tensors, because Flower sends every array as a separate object, at tens of milliseconds
each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Self

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor

from flexperts.errors import incompatible

Vector = NDArray[np.float32]

_MOST_TENSORS = 2**18
_Length = Annotated[int, Field(ge=0, lt=2**48)]
_Shape = Annotated[tuple[_Length, ...], Field(max_length=16)]
_PAIRS = TypeAdapter(list[tuple[Annotated[str, Field(max_length=1000)], _Shape]])


@dataclass(frozen=True)
class Manifest:
    """Names and shapes of the tensors in a flat vector, in order.

    Args:
        names: Tensor names, sorted.
        shapes: The tensors' shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Manifest:
        """Describe ``tensors`` in the order of their sorted names."""
        names = tuple(sorted(tensors))
        return cls(names, tuple(tuple(tensors[n].shape) for n in names))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what ``to_json`` wrote; the text may come from another machine."""
        if text.count("[") > 2 * _MOST_TENSORS + 1:
            raise incompatible(f"manifest {text[:80]!r}", f"it must list at most {_MOST_TENSORS:,} tensors")
        try:
            pairs = _PAIRS.validate_json(text, strict=True)
        except ValueError as error:
            raise incompatible(f"manifest {text[:80]!r}", "it must list names with shapes") from error
        names = tuple(name for name, _ in pairs)
        if names != tuple(sorted(set(names))):
            raise incompatible(f"manifest {text[:80]!r}", "its names must be unique and sorted")
        return cls(names, tuple(shape for _, shape in pairs))

    def to_json(self) -> str:
        """Return the manifest as JSON text."""
        return json.dumps(list(zip(self.names, self.shapes, strict=True)))

    @property
    def size(self) -> int:
        """Number of elements of the whole vector."""
        return sum(prod(shape) for shape in self.shapes)

    def unflatten(self, vector: Vector) -> dict[str, Tensor]:
        """Split a vector into named fp32 tensors that share its memory, or that of a copy if it is read-only."""
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise incompatible(
                f"vector {vector.dtype}{list(vector.shape)}", f"the manifest requires float32[{self.size}]"
            )
        if is_sizes_only(vector):
            return {n: torch.empty(s, device="meta") for n, s in zip(self.names, self.shapes, strict=True)}
        values = torch.from_numpy(vector if vector.flags.writeable else vector.copy())
        pieces = torch.split(values, [prod(s) for s in self.shapes])
        return {n: piece.view(s) for n, s, piece in zip(self.names, self.shapes, pieces, strict=True)}


def flatten(tensors: Mapping[str, Tensor]) -> Vector:
    """Join tensors, in sorted order of names, into one new fp32 vector; for meta tensors, one without values."""
    if not tensors:
        return np.zeros(0, dtype=np.float32)
    if any(tensor.is_meta for tensor in tensors.values()):
        return sizes_only(sum(tensor.numel() for tensor in tensors.values()))
    parts = [tensors[name].detach().float().reshape(-1).cpu() for name in sorted(tensors)]
    return torch.cat(parts).numpy()


def sizes_only(size: int) -> Vector:
    """Return a vector with a length and no memory; plans use it instead of weights."""
    return as_strided(np.zeros(1, dtype=np.float32), (size,), (0,))


def is_sizes_only(vector: Vector) -> bool:
    """Return whether a vector has only a length; its tensors are then on the meta device."""
    return vector.size > 0 and vector.strides == (0,)


def vector_hash(vector: Vector) -> str:
    """Return the SHA-256 of the vector's bytes, which states record for the weights to which they belong."""
    return hashlib.sha256(np.ascontiguousarray(vector).tobytes()).hexdigest()


@dataclass(frozen=True)
class Payload:
    """The tensors of one message.

    Args:
        manifest: Names and shapes.
        vector: The values, flat, in the manifest's order.
    """

    manifest: Manifest
    vector: Vector

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Copy named tensors into a payload."""
        return cls(Manifest.of(tensors), flatten(tensors))

    @classmethod
    def empty(cls) -> Self:
        """Return the payload of a message without weights."""
        return cls(Manifest((), ()), np.zeros(0, dtype=np.float32))

    def digest(self, *texts: str) -> str:
        """Return the SHA-256, in hex, of names, shapes, values and some texts that belong to them."""
        told = [self.manifest.to_json(), vector_hash(self.vector), *texts]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of fp32 values."""
        return self.manifest.size

    def tensors(self) -> dict[str, Tensor]:
        """Return the named fp32 tensors, which share the vector's memory."""
        return self.manifest.unflatten(self.vector)

    def check(self, expected: Manifest, sender: str) -> Self:
        """Return this payload if it contains exactly the expected tensors."""
        if self.manifest != expected:
            raise incompatible(
                f"{sender} sent {_difference(self.manifest, expected)}",
                "a message must contain exactly the tensors that the method declares",
            )
        return self


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy tensors into others of the same names and shapes, in place."""
    sent, expected = Manifest.of(source), Manifest.of(target)
    if sent != expected:
        raise incompatible(_difference(sent, expected), "names and shapes must be those of the model")
    for name, tensor in source.items():
        target[name].copy_(tensor)


def _difference(sent: Manifest, expected: Manifest) -> str:
    ours, theirs = (dict(zip(m.names, m.shapes, strict=True)) for m in (expected, sent))
    odd = min(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    return f"{odd} as {theirs.get(odd, 'nothing')} where {ours.get(odd, 'nothing')} is expected"
