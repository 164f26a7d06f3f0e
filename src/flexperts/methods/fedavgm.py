"""FedAvgM: momentum on the server."""

from __future__ import annotations

import torch
from pydantic import Field

from flexperts.methods import base
from flexperts.methods.base import Method
from flexperts.methods.server import Server
from flexperts.parameters.vector import Vector


class FedAvgM(Method):
    """FedAvg on attention LoRA with momentum on the server.

    Source: Hsu et al., 2019 (arXiv 1909.06335), section 4.3.
    delta = mean_i theta_i - x;  m <- momentum m + delta;  x <- x + server_lr m, x being the global LoRA.
    Trained: attention LoRA. Sent: attention LoRA. Aggregated: the mean by rows, then this step. Stays: nothing.
    Inference: the global LoRA.
    Open choices: plain momentum, not Nesterov's, as in the paper's equation. Defaults: server_lr 1 and momentum 0.5
    where the paper uses 0.9: with momentum b the steps add up to 1/(1-b) times FedAvg's, and ten times is far for
    the few rounds in which LoRA is trained.
    """

    name = "fedavgm"
    summary = "FedAvg with momentum on the server"
    source = "Hsu et al., arXiv 1909.06335"

    class Options(base.Options):
        """Settings of the server's step."""

        server_lr: float = Field(1.0, gt=0)
        """The server's learning rate."""
        momentum: float = Field(0.5, ge=0, lt=1)
        """What stays of the last round's step; 0 with server_lr 1 is FedAvg."""

    def start(self, server: Server) -> None:
        """Set up the momentum."""
        server.memory["momentum"] = torch.zeros(server.shared.size)

    def step(self, server: Server, mean: Vector) -> Vector:
        """Return the weights after one step on the clients' mean."""
        x = torch.from_numpy(server.shared.vector)
        momentum = self.options.momentum * server.memory["momentum"] + (torch.from_numpy(mean) - x)
        server.memory["momentum"] = momentum
        following: Vector = (x + self.options.server_lr * momentum).numpy()
        return following
