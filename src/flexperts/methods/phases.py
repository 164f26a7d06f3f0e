"""A round in two phases: first what is personal, then what is shared."""

from __future__ import annotations

from flexperts.methods.turn import Turn
from flexperts.training.local import StepHooks, TrainResult, joined


def personal_then_shared(turn: Turn, share: float, hooks: StepHooks | None = None) -> TrainResult:
    """Train each group while the other stands still; the phases divide the round's steps, each takes at least one.

    Args:
        turn: The client's turn; both groups have parameters.
        share: The personal phase's share of the steps; the rest is the shared phase's, so that no step is lost.
        hooks: What the method adds to every step of the shared phase.
    """
    personal = turn.settings.part(share)
    shared = turn.settings.part(1 - personal.steps / turn.settings.steps)
    first = turn.fit(shared=False, settings=personal)
    return joined(first, turn.fit(personal=False, settings=shared, hooks=hooks))
