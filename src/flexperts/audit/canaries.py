"""Canaries: made-up secrets in the audited silo's rows, and how well the model that an observer has knows them.

Source: Carlini et al., 2019 (arXiv 1802.08232). Exposure is log2 of the number of candidates minus log2 of the
canary's rank among them; the others are secrets that were drawn alike and never trained. A secret's score is how
much lower its loss is than under the untouched base, which knows none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator

from flexperts.data.rows import Row

_DIGITS = 10
_INSTRUCTION = "What is the reference number of this archive?"


def secrets(count: int, stream: Generator) -> list[Row]:
    """Return rows with different random numbers of ten digits as their responses."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        digits = torch.randint(10, (_DIGITS,), generator=stream).tolist()
        drawn["".join(map(str, digits))] = None
    return [Row(_INSTRUCTION, secret, passage=secret) for secret in drawn]


def exposures(canaries: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return each canary's exposure in bits, from 0 to log2 of the number of candidates.

    Args:
        canaries: Scores of the canaries; higher is better known.
        others: Scores of the candidates that were not trained. A tie counts as half a place.
    """
    size = len(others) + 1
    ranks = [1 + sum((o > own) + (o == own) / 2 for o in others) for own in canaries]
    return [math.log2(size) - math.log2(rank) for rank in ranks]


def chance(others: int) -> float:
    """Return the mean exposure of a canary that the model does not know, whose rank is any with equal chance."""
    size = others + 1
    return sum(math.log2(size) - math.log2(rank) for rank in range(1, size + 1)) / size
