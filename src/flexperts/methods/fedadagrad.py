"""FedAdagrad: Adagrad's step on the server."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from flexperts.methods import base
from flexperts.methods.server_optimizer import AdaptiveMethod


class FedAdagrad(AdaptiveMethod):
    """FedAvg on attention LoRA with Adagrad's step on the server: steps shrink as changes add up.

    Source: Reddi et al., ICLR 2021 (arXiv 2003.00295), algorithm 2.
    delta = mean_i theta_i - x;  m <- beta_1 m + (1 - beta_1) delta;  v <- v + delta^2;
    x <- x + server_lr m / (sqrt(v) + tau), x being the global LoRA.
    Trained: attention LoRA. Sent: attention LoRA. Aggregated: the mean by rows, then this step. Stays: nothing.
    Inference: the global LoRA.
    Open choices: beta_1 = 0 by default, as in the paper's experiments; v starts at tau^2, the least value that the
    paper allows (Flower: 0); the mean is by rows, as in the paper's experiments. Defaults: server_lr 1e-2 (round 1
    moves a weight by about that much, round t by about 1/sqrt(t) of it), tau 1e-3.
    """

    name = "fedadagrad"
    summary = "FedAvg with Adagrad's step on the server"
    source = "Reddi et al., ICLR 2021"

    class Options(base.Options):
        """Settings of the server's step."""

        server_lr: float = Field(1e-2, gt=0)
        """The server's learning rate: about the change of a weight in the first round."""
        beta_1: float = Field(0.0, ge=0, lt=1)
        """Decay of the first moment."""
        tau: float = Field(1e-3, gt=0)
        """Adaptivity: changes far below it are scaled alike, changes far above it to equal size."""

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return the sum of squared changes."""
        return v + squared
