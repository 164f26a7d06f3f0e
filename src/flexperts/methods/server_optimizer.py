"""Adaptive server optimizers: what FedAdagrad, FedAdam and FedYogi have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from flexperts.methods import base
from flexperts.methods.base import Method
from flexperts.methods.server import Server
from flexperts.parameters.vector import Vector


class AdaptiveOptions(base.Options):
    """Settings of an adaptive server optimizer."""

    server_lr: float = Field(3e-3, gt=0)
    """The server's learning rate: about the largest change of a weight in one round."""
    beta_1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta_2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    tau: float = Field(1e-3, gt=0)
    """Adaptivity: changes far below it are scaled alike, changes far above it to equal size."""


class AdaptiveMethod(Method):
    """FedAvg with an adaptive step of the server on the mean change of a round, x being the global weights.

    delta = mean_i theta_i - x;  m <- beta_1 m + (1 - beta_1) delta;  v <- second(v, delta^2);
    x <- x + server_lr m / (sqrt(v) + tau), from m = 0 and v = tau^2, without bias correction.
    """

    Options = AdaptiveOptions

    def start(self, server: Server) -> None:
        """Set up both moments."""
        size = server.shared.size
        server.memory["first_moment"] = torch.zeros(size)
        server.memory["second_moment"] = torch.full((size,), self.options.tau**2)

    def step(self, server: Server, mean: Vector) -> Vector:
        """Return the weights after one step on the clients' mean."""
        options, memory = self.options, server.memory
        x = torch.from_numpy(server.shared.vector)
        delta = torch.from_numpy(mean) - x
        first = options.beta_1 * memory["first_moment"] + (1 - options.beta_1) * delta
        second = self.second_moment(memory["second_moment"], delta.square())
        memory.update(first_moment=first, second_moment=second)
        following: Vector = (x + options.server_lr * first / (second.sqrt() + options.tau)).numpy()
        return following

    @abstractmethod
    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return the next second moment from the last one and the squared change: not the squared momentum."""
