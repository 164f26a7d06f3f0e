"""What a client makes of its trained weights before they leave: clipped and noised, then packed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexperts.communication.compression import Packed, pack, unpack
from flexperts.config.federation import CompressionConfig
from flexperts.config.run import RunConfig
from flexperts.parameters.vector import Payload, Vector
from flexperts.protection.clipping import noised

RESIDUAL = "compression.residual"
"""Where a client's memory keeps what packing has lost so far."""
_TELLING = ("loss", "tokens")
"""Measures made from rows: beside a noised update they would tell what the noise hides."""


@dataclass(frozen=True)
class Outgoing:
    """What leaves a client after a round.

    Args:
        payload: The weights, as the server has them in the end.
        packed: The packed update that is sent in their place, if the recipe packs.
        hidden: The method's own vector where noise or packing have changed it.
    """

    payload: Payload
    packed: Packed | None = None
    hidden: tuple[Vector, ...] = ()


def protect(
    config: RunConfig, received: Payload, trained: Payload, memory: dict[str, Tensor], client: str
) -> Outgoing:
    """Apply what the recipe says to a client's update: local noise first, then packing.

    Args:
        config: The run.
        received: What the server sent.
        trained: What the method sends.
        memory: The client's memory, in which what packing has lost is kept for the next round.
        client: Who it is, for errors.

    Raises:
        FederationError: The method sends other tensors than it received.
    """
    local, packs = config.privacy.noise == "local", config.compression.kind != "none"
    if not trained.size or not (local or packs):
        return Outgoing(trained)
    trained.check(received.manifest, client)
    change: Vector = trained.vector - received.vector
    if local:
        change = noised(change, config.privacy.clip, config.privacy.noise_multiplier)
    packed = None
    if packs and np.isfinite(change).all():  # the server refuses what is not finite, by the silo's name
        change, packed = _packed(config.compression, change, memory)
    payload = Payload(trained.manifest, received.vector + change)
    return Outgoing(payload, packed, (trained.vector,))


def told(config: RunConfig, names: Iterable[str]) -> list[str]:
    """Return which of a round's measures the server is told: under local noise, none that is made from rows."""
    return [name for name in names if config.privacy.noise != "local" or name not in _TELLING]


def _packed(settings: CompressionConfig, change: Vector, memory: dict[str, Tensor]) -> tuple[Vector, Packed]:
    """Return the update as the server will rebuild it, and packed; what is lost goes into the memory."""
    if settings.error_feedback and RESIDUAL in memory:
        change = change + memory[RESIDUAL].cpu().numpy()
    packed = pack(change, settings)
    rebuilt = unpack(packed, change.size, "packing")
    if settings.error_feedback:
        memory[RESIDUAL] = torch.from_numpy(change - rebuilt)
    return rebuilt, packed
