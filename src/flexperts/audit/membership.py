"""Membership inference: from the losses on the weights that an observer has, which rows were trained on.

A row's score is how much lower its loss is than under the untouched base (calibration by difficulty, Watson et al.,
2022, arXiv 2111.08440). Rates at few false alarms follow Carlini et al., 2022 (arXiv 2112.03570).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Values = NDArray[np.float64]


def auc(members: Values, others: Values) -> float:
    """Return the chance that a member's score is above another row's; ties count half. 0.5 is no knowledge."""
    ranks = np.searchsorted(np.sort(others), members, "left") + np.searchsorted(np.sort(others), members, "right")
    return float(ranks.mean() / 2 / len(others))


def caught(members: Values, others: Values, alarms: float) -> float:
    """Return the share of members above a threshold that at most a share ``alarms`` of the other rows exceed."""
    allowed = int(alarms * len(others) + 1e-9)
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())


def membership(members: Sequence[float], others: Sequence[float], seed: int) -> dict[str, Any]:
    """Return AUC and the shares of members found at 1 % and 5 % false alarms, each with a 95 % interval.

    The intervals are over rows: members and others are drawn with replacement.

    Args:
        members: Scores of rows that were trained on; higher is more likely a member.
        others: Scores of other rows of the same silo.
        seed: Seed of the resamples.
    """
    ours, theirs = np.array(members, dtype=np.float64), np.array(others, dtype=np.float64)
    stream = np.random.default_rng(seed)
    draws = [(stream.choice(ours, len(ours)), stream.choice(theirs, len(theirs))) for _ in range(RESAMPLES)]
    measures: dict[str, Callable[[Values, Values], float]] = {
        "auc": auc,
        "at_1": lambda a, b: caught(a, b, 0.01),
        "at_5": lambda a, b: caught(a, b, 0.05),
    }
    found = {name: bounds(its(ours, theirs), [its(a, b) for a, b in draws]) for name, its in measures.items()}
    return {"members": len(ours), "others": len(theirs), **found}


def bounds(value: float, draws: Sequence[float]) -> dict[str, float]:
    """Return a value with the ends of its 95 % percentile interval over resamples."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high)}
