"""Who holds which expert of a pool: how well experts fit clients, and the best assignment by an integer program.

Shapes: N experts, C clients, r rank.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from flexperts.errors import ConfigError


def check_places(experts: int, clients: int, clients_per_expert: int, least: int, most: int) -> None:
    """Refuse numbers for which there is no assignment.

    Raises:
        ConfigError: No assignment gives every expert its clients and every client ``least`` to ``most`` experts.
    """
    places = experts * clients_per_expert
    fewest, greatest = clients * least, clients * min(most, experts)
    if clients_per_expert > clients or not fewest <= places <= greatest:
        raise ConfigError(
            f"{experts} experts x {clients_per_expert} holders over {clients} clients",
            f"each client holds {least} to {most} different experts, which makes {fewest} to {greatest} places",
            "change method.options experts, clients_per_expert, min_experts or max_experts",
        )


def affinity(experts: Tensor, tokens: Tensor) -> Tensor:
    """Return q ``[N, C]``, softmax over clients, from embeddings ``experts [N, r]`` and ``tokens [C, r]``."""
    return (experts.double() @ tokens.double().T / math.sqrt(experts.shape[1])).softmax(1)


def assign(gain: Tensor, clients_per_expert: int, least: int, most: int) -> Tensor:
    """Return the assignment ``[N, C]`` of 0 and 1 that maximises the gain on it.

    Args:
        gain: What it is worth that client i holds expert e, ``[N, C]``.
        clients_per_expert: Sum of every row.
        least, most: Bounds on the sum of every column.
    """
    experts, clients = gain.shape
    rows = np.kron(np.eye(experts), np.ones((1, clients)))
    columns = np.kron(np.ones((1, experts)), np.eye(clients))
    holders = LinearConstraint(rows, clients_per_expert, clients_per_expert)
    limits = [holders, LinearConstraint(columns, least, most)]
    size = experts * clients
    solved = milp(
        -gain.double().numpy().ravel(), constraints=limits, integrality=np.ones(size), bounds=Bounds(0, 1)
    )
    return torch.from_numpy(solved.x.round()).float().view(experts, clients)
