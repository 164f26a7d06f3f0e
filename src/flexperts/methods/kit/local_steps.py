"""Building blocks of local training: phases, a proximal term, a balance loss, a test for an untrained adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from flexperts.data.prompts import Example
from flexperts.methods.kit.turn import Turn
from flexperts.training.local import LocalSettings, Objective, StepHooks, TrainResult, joined


def personal_then_shared(turn: Turn, share: float, hooks: StepHooks | None = None) -> TrainResult:
    """Train the personal group with the shared one frozen, then the reverse; each phase has at least one step.

    Args:
        turn: The client's turn; both groups have parameters.
        share: The personal phase's share of the round's steps; the shared phase takes the rest.
        hooks: The method's additions to every step of the shared phase.
    """
    personal = turn.settings.part(share)
    shared = turn.settings.part(1 - personal.steps / turn.settings.steps)
    first = turn.fit(shared=False, settings=personal)
    return joined(first, turn.fit(personal=False, settings=shared, hooks=hooks))


def untrained(turn: Turn) -> bool:
    """Return whether the client's personal adapter is still untrained: every B is zero."""
    return not any(bool(p.any()) for name, p in turn.split.personal.items() if ".lora_B." in name)


def proximal(
    parameters: Mapping[str, Parameter], anchors: Mapping[str, Tensor], mu: float
) -> Callable[[], Tensor] | None:
    """Return a function for the penalty mu/2 ||theta - anchor||^2 over all named parameters; None if mu is 0.

    Args:
        parameters: The trained parameters theta.
        anchors: The anchors, under the same names.
        mu: Strength, at least 0.

    Source: Li et al., MLSys 2020 (FedProx), section 3: the norm is squared.
    """
    if mu == 0:
        return None
    fixed = {name: anchors[name].detach().clone() for name in parameters}

    def penalty() -> Tensor:
        terms = [(parameter - fixed[name]).square().sum() for name, parameter in parameters.items()]
        return mu / 2 * torch.stack(terms).sum()

    return penalty


class Balancing(Protocol):
    """What tells how unevenly the last forward pass used its experts."""

    def balance_loss(self) -> Tensor:
        """Return the loss, a scalar."""


def balanced(objective: Objective, experts: Balancing, weight: float) -> Objective:
    """Return the objective with the balance loss in its gradient only; its value does not change."""

    def parts(model: nn.Module, rows: Sequence[Example], settings: LocalSettings) -> Iterator[Tensor]:
        count = math.ceil(len(rows) / settings.training.rows_per_pass)
        for part in objective(model, rows, settings):
            extra = weight / count * experts.balance_loss()
            yield part + (extra - extra.detach())

    return parts
