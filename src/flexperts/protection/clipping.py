"""Bounding an update's L2 norm, and the noise that hides one client among others."""

from __future__ import annotations

import os

import numpy as np
from scipy.special import ndtri

from flexperts.parameters.vector import Vector

_BITS = 52
"""Random bits of a value: with one more, a half could not be added without rounding."""


def clipped(change: Vector, norm: float) -> Vector:
    """Return an update scaled down to an L2 norm of at most ``norm``; a shorter one as it is.

    Source: flat clipping of McMahan et al., 2018 (arXiv 1710.06963).
    """
    length = float(np.sqrt(np.square(change, dtype=np.float64).sum()))
    if length <= norm:
        return change
    with np.errstate(invalid="ignore"):  # whoever gets an update that is not finite refuses it
        return np.asarray(change * np.float32(norm / length))


def gaussian(size: int, std: float) -> Vector:
    """Return normal noise made of the operating system's entropy alone.

    No seed: what the recipe's seed draws is known to everyone, and NumPy's global stream, which Flower's own noise
    comes from, may have been seeded by any library in the process.
    """
    bits = np.frombuffer(os.urandom(8 * size), np.uint64) >> np.uint64(64 - _BITS)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-_BITS  # above 0 and below 1
    return np.asarray(std * ndtri(uniform), dtype=np.float32)


def noised(change: Vector, clip: float, noise_multiplier: float) -> Vector:
    """Return an update clipped and hidden in noise, as local differential privacy sends it.

    Flower's ``LocalDpMod`` does the same to a ClientApp's reply; it does not fit because in a deployed silo a
    ClientApp is a relay, and the bare update would reach it.
    """
    return clipped(change, clip) + gaussian(change.size, noise_multiplier * clip)
