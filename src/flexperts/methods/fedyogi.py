"""FedYogi: Yogi's step on the server."""

from __future__ import annotations

from torch import Tensor

from flexperts.methods.server_optimizer import AdaptiveMethod


class FedYogi(AdaptiveMethod):
    """FedAvg on attention LoRA with Yogi's step on the server: v grows as in Adam, and shrinks slowly.

    Source: Reddi et al., ICLR 2021 (arXiv 2003.00295), algorithm 2.
    delta = mean_i theta_i - x;  m <- beta_1 m + (1 - beta_1) delta;
    v <- v - (1 - beta_2) delta^2 sign(v - delta^2);
    x <- x + server_lr m / (sqrt(v) + tau), x being the global LoRA.
    Trained: attention LoRA. Sent: attention LoRA. Aggregated: the mean by rows, then this step. Stays: nothing.
    Inference: the global LoRA.
    Open choices: no bias correction, as in the paper; v starts at tau^2, the least value that the paper allows
    (Flower: 0); the mean is by rows, as in the paper's experiments. Defaults as FedAdam's.
    """

    name = "fedyogi"
    summary = "FedAvg with Yogi's step on the server"
    source = "Reddi et al., ICLR 2021"

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Move the second moment towards the squared change by an amount that does not depend on its distance."""
        following: Tensor = v - (1 - self.options.beta_2) * squared * (v - squared).sign()
        return following
