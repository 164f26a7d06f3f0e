"""Discrete Gaussian noise, of which the sum of many clients' noise is as good as one.

Sources: Canonne, Kamath and Steinke, 2020 (arXiv 2004.00010), algorithm 3: a discrete Laplace number, accepted with
the probability that makes it Gaussian; Kairouz, Liu and Steinke, 2021 (arXiv 2102.06387): sums of such noise.
"""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray

LEAST = 100.0
"""Least standard deviation in whole numbers: the sum of noise then differs from one discrete Gaussian by less than
e^-100000, the term tau of Kairouz et al., theorem 1."""
_BITS = 52


def discrete_gaussian(size: int, std: float) -> NDArray[np.int64]:
    """Return whole numbers, k with a probability proportional to exp(-k^2 / (2 std^2)).

    They come from the operating system's random bytes, in float64: a probability is right but for a share of 1e-15.

    Args:
        size: How many.
        std: Above 0.
    """
    found, scale = np.empty(0, np.int64), math.floor(std) + 1
    while found.size < size:
        count = 2 * (size - found.size) + 64
        length = np.floor(-scale * np.log(_uniform(count)))
        negative = _uniform(count) < 0.5
        kept = ~(negative & (length == 0))  # zero would come twice
        kept &= _uniform(count) < np.exp(-np.square(length - std**2 / scale) / (2 * std**2))
        drawn = np.where(negative, -length, length)[kept].astype(np.int64)
        found = np.concatenate([found, drawn])
    return found[:size]


def _uniform(size: int) -> NDArray[np.float64]:
    """Return numbers above 0 and below 1."""
    bits = np.frombuffer(os.urandom(8 * size), np.uint64) >> np.uint64(64 - _BITS)
    return (bits.astype(np.float64) + 0.5) * 2.0**-_BITS
