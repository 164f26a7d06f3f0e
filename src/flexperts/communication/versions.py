"""Versions of the shared weights that clients have, and the packed differences between them.

Version 0 are the initial weights, which every client can compute by itself; each round's aggregation makes the next
one. A client with any kept version gets the differences from there; another one gets all weights. The numbers only
save a question: what decides is a version's digest, which both sides compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flexperts.communication.compression import Packed, pack, unpack
from flexperts.communication.messages import difference_records
from flexperts.communication.schema import MOST_VERSIONS
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.federation import CompressionConfig
from flexperts.parameters.vector import Payload, Vector


@dataclass
class Versions:
    """What a server keeps of the versions.

    Args:
        digests: Digests of the kept versions, oldest first.
        first: Number of the oldest kept version.
        differences: The packed difference to each kept version from the one before; none to the oldest.
        held: Client -> newest version that it is known to have; the others can have version 0.
        residual: What packing has lost so far; empty if nothing.
    """

    digests: list[str]
    first: int = 0
    differences: list[Packed] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    residual: Vector = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def newest(self) -> int:
        """Number of the newest version."""
        return self.first + len(self.differences)

    def since(self, client: str) -> tuple[Sequence[str], Sequence[Packed]] | None:
        """Return the digests from a client's version to the newest, and the differences; None if too old."""
        missing = self.held.get(client, 0) - self.first
        return (self.digests[missing:], self.differences[missing:]) if missing >= 0 else None

    def restart(self, payload: Payload) -> None:
        """Begin with weights that no client has, and that do not come from the newest version."""
        empty = np.zeros(0, np.float32)
        self.first, self.digests, self.differences, self.residual = self.newest + 1, [payload.digest()], [], empty

    def add(self, before: Payload, after: Payload, settings: CompressionConfig) -> Payload:
        """Pack the way from the newest version to other weights, and return the version that clients get to.

        Args:
            before: The newest version.
            after: Weights with the same tensors; all values are finite.
            settings: The downlink's packing as ``kind``.
        """
        change = after.vector - before.vector
        if self.residual.size:
            change += np.float32(settings.feedback_decay) * self.residual
        packed = pack(change, settings)
        rebuilt = unpack(packed, change.size, settings, "packing")
        if settings.error_feedback:
            self.residual = change - rebuilt
        new = Payload(before.manifest, before.vector + rebuilt)
        self.differences.append(packed)
        self.digests.append(new.digest())
        dropped = len(self.differences) - most_differences(new.vector.nbytes, size_of(packed))
        if dropped > 0:
            self.first, self.digests = self.first + dropped, self.digests[dropped:]
            self.differences = self.differences[dropped:]
        return new


def most_differences(whole: int, one: int) -> int:
    """Return the longest chain of differences that is less than all weights, and that a request may hold.

    Args:
        whole: Bytes of all weights.
        one: Bytes of a difference as ``size_of`` counts them; all of a chain have as many.
    """
    return min(max(0, whole - 1) // one, MOST_VERSIONS - 1)


def size_of(packed: Packed) -> int:
    """Return the bytes that a packed difference adds to a request: its arrays, what wraps them, its digest."""
    return _encoded(packed) - _encoded()


def _encoded(*differences: Packed) -> int:
    return encoded_bytes(difference_records({}, ["0" * 64] * (len(differences) + 1), differences))
