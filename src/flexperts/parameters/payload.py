"""Named tensors in the form in which they travel: one flat fp32 vector with its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

from flexperts.errors import FederationError
from flexperts.parameters.vector import Manifest, Vector, flatten


@dataclass(frozen=True)
class Payload:
    """What one message carries.

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
        """Return the payload of a message that carries no weights."""
        return cls(Manifest((), ()), np.zeros(0, dtype=np.float32))

    @property
    def size(self) -> int:
        """Number of fp32 values."""
        return self.manifest.size

    def tensors(self) -> dict[str, Tensor]:
        """Return the named fp32 tensors, which share the vector's memory."""
        return self.manifest.unflatten(self.vector)

    def check(self, expected: Manifest, sender: str) -> Self:
        """Return this payload if it holds just what is expected.

        Raises:
            FederationError: Names or shapes differ.
        """
        if self.manifest != expected:
            raise FederationError(
                f"{sender} sent {_difference(self.manifest, expected)}",
                "a message holds the tensors that the method declares",
                "use one flexperts version and one recipe on every silo",
            )
        return self


def _difference(sent: Manifest, expected: Manifest) -> str:
    ours, theirs = (dict(zip(m.names, m.shapes, strict=True)) for m in (expected, sent))
    odd = min(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    return f"{odd} as {theirs.get(odd, 'nothing')} where {ours.get(odd, 'nothing')} is expected"
