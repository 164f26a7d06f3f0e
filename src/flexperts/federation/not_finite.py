"""Whose fault it is that a score is no finite number: the base's, or the training's."""

from __future__ import annotations

from collections.abc import Mapping

from flexperts.evaluation.scores import SCORES, Scores
from flexperts.methods.base import State

BASE = (
    "the untouched base's logits are not finite numbers on these rows, so the cause is the base and not the "
    "training; use other weights, or another model.dtype or model.precision"
)
TRAINING = (
    "its model's logits are not finite numbers, and the untouched base's are: training has diverged; lower "
    "training.lr or training.personal_lr"
)


def reasons(metrics: Mapping[str, float | int | None]) -> dict[str, str]:
    """Return state -> why it has no score, of one client's scores by ``SCORE.STATE``, None where not finite."""
    found = [kind_and_state.partition(".") for kind_and_state, value in metrics.items() if value is None]
    states = dict.fromkeys(state for kind, _, state in found if kind in SCORES)
    return dict.fromkeys(states, BASE if "zero_shot" in states else TRAINING)


def reasons_of(scores: Mapping[State, Scores]) -> dict[str, str]:
    """Return state -> why it has no score, of one client's scores by state."""
    return reasons({f"{kind}.{s}": value for s, its in scores.items() for kind, value in its.metrics().items()})
