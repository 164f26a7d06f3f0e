"""FedProx: FedAvg with a proximal term that keeps each client close to the weights it received."""

from __future__ import annotations

from pydantic import Field

from flexperts.methods.kit.local_steps import proximal
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.turn import Turn
from flexperts.training.local import StepHooks, TrainResult


class FedProx(Method):
    """FedAvg on attention LoRA with a proximal term in the local loss.

    Source: Li et al., MLSys 2020 (Federated Optimization in Heterogeneous Networks), algorithm 2.
    Client i minimises f_i(theta) + mu/2 ||theta - theta_t||^2, theta_t being the LoRA it received.
    Trained: attention LoRA. Sent: attention LoRA. Aggregated: its mean by rows. Stays: nothing.
    Inference: the global LoRA.
    Open choices: the norm is squared, as in the paper (Flower's FedProx documents the square; its code lacks it);
    its gradient mu (theta - theta_t) is clipped together with the loss's. The paper draws clients by their share of
    the rows and averages uniformly; here the draw is uniform and the mean by rows. Default mu 0.01, one of the
    paper's candidates (0.001 to 1). A round of one step is FedAvg's: theta is theta_t when its gradient is taken.
    """

    name = "fedprox"
    summary = "FedAvg with a proximal term that keeps clients close to the global LoRA"
    source = "Li et al., MLSys 2020"

    class Options(Method.Options):
        """Settings of the proximal term."""

        mu: float = Field(0.01, ge=0)
        """Strength of the proximal term; 0 is FedAvg."""

    options: Options

    def train(self, turn: Turn) -> TrainResult:
        """Train with the proximal term on the shared part."""
        return turn.fit(hooks=StepHooks(penalty=proximal(turn.split.shared, turn.received, self.options.mu)))
