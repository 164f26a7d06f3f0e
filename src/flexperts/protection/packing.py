"""Packing of a client's update for sending; the packing error is kept for the next round."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexperts.communication.compression import Packed, pack, unpack
from flexperts.parameters.vector import Vector
from flexperts.protection.protection import Protection

RESIDUAL = "compression.residual"
"""Name of the packing error so far, in a client's memory."""


class Packing(Protection):
    """Fewer bits for a value, or the largest values only. The server unpacks a message when it reads it."""

    key = "compression.kind"

    def outgoing(self, change: Vector, memory: dict[str, Tensor]) -> tuple[Vector, Packed | None]:
        """Return the update as the server will rebuild it, and packed; store the packing error in the memory."""
        settings = self.config.compression
        if not np.isfinite(change).all():
            return change, None  # the server refuses it, with the silo's name
        if settings.error_feedback and RESIDUAL in memory:
            change = change + (settings.feedback_decay * memory[RESIDUAL]).cpu().numpy()
        packed = pack(change, settings)
        rebuilt = unpack(packed, change.size, settings, "packing")
        if settings.error_feedback:
            memory[RESIDUAL] = torch.from_numpy(change - rebuilt)
        return rebuilt, packed
