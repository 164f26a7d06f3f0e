"""The proximal term: a spring that holds parameters near where they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


def proximal(
    parameters: Mapping[str, Parameter], anchors: Mapping[str, Tensor], mu: float
) -> Callable[[], Tensor] | None:
    """Return the penalty mu/2 ||theta - anchor||^2 over all named parameters; None where mu is 0.

    Args:
        parameters: What trains.
        anchors: Where it is held, by the same names.
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
