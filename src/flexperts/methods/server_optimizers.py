"""FedAdagrad, FedAdam, FedYogi and FedAvgM: FedAvg with an optimizer's step on the server."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Vector

_FEDOPT = (
    "FedAvg's steps, and no rows for a search; Reddi et al.'s algorithm 2 with the mean by rows, not OpenFedLLM's "
    "variant, which the FLEx paper uses: that averages uniformly"
)


class AdaptiveMethod(Method):
    """FedAvg with an adaptive server step on the mean change of a round; x are the global weights.

    delta = mean_i theta_i - x;  m <- beta_1 m + (1 - beta_1) delta;  v <- second(v, delta^2);
    x <- x + server_lr m / (sqrt(v) + tau), from m = 0 and v = tau^2, without bias correction.
    """

    class Options(Method.Options):
        """Settings of an adaptive server optimizer."""

        server_lr: float = Field(3e-3, gt=0)
        """The server's learning rate: about the largest change of a weight in one round."""
        beta_1: float = Field(0.9, ge=0, lt=1)
        """Decay of the first moment."""
        tau: float = Field(1e-3, gt=0)
        """Adaptivity: changes far below tau are scaled alike; changes far above tau get equal size."""

    options: Options

    def start(self, server: Server) -> None:
        """Initialize both moments."""
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
        """Return the next second moment from the last one and the squared change (not the squared momentum)."""


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
    budget_note = _FEDOPT

    class Options(AdaptiveMethod.Options):
        """Settings of the server's step."""

        server_lr: float = Field(1e-2, gt=0)
        """The server's learning rate: about the change of a weight in the first round."""
        beta_1: float = Field(0.0, ge=0, lt=1)
        """Decay of the first moment."""

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return the sum of squared changes."""
        return v + squared


class FedAdam(AdaptiveMethod):
    """FedAvg on attention LoRA with Adam's step on the server.

    Source: Reddi et al., ICLR 2021 (arXiv 2003.00295), algorithm 2.
    delta = mean_i theta_i - x;  m <- beta_1 m + (1 - beta_1) delta;  v <- beta_2 v + (1 - beta_2) delta^2;
    x <- x + server_lr m / (sqrt(v) + tau), x being the global LoRA.
    Trained: attention LoRA. Sent: attention LoRA. Aggregated: the mean by rows, then this step. Stays: nothing.
    Inference: the global LoRA.
    Open choices: no bias correction, as in the paper (Flower's FedAdam has one, with exponent t + 1 in round t); v
    starts at tau^2, the least value that the paper allows (Flower: 0); the mean is by rows, as in the paper's
    experiments, where its algorithm has a uniform one. Defaults: server_lr 3e-3, the best of 1e-3, 3e-3 and 1e-2
    on our validation rows (docs/results/choices.md; at 1e-2 four rounds left a ROUGE-L below the untouched base's
    where clients conflict); beta_1 0.9, beta_2 0.99, tau 1e-3 as in the paper's experiments.
    """

    name = "fedadam"
    summary = "FedAvg with Adam's step on the server"
    source = "Reddi et al., ICLR 2021"
    budget_note = f"{_FEDOPT}, starts m at the first change, and squares m instead of the change"

    class Options(AdaptiveMethod.Options):
        """Settings of the server's step."""

        beta_2: float = Field(0.99, ge=0, lt=1)
        """Decay of the second moment."""

    options: Options

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return the moving mean of squared changes."""
        return self.options.beta_2 * v + (1 - self.options.beta_2) * squared


class FedAvgM(Method):
    """FedAvg on attention LoRA with momentum on the server.

    Source: Hsu et al., 2019 (arXiv 1909.06335), section 4.3.
    delta = mean_i theta_i - x;  m <- momentum m + delta;  x <- x + server_lr m, x being the global LoRA.
    Trained: attention LoRA. Sent: attention LoRA. Aggregated: the mean by rows, then this step. Stays: nothing.
    Inference: the global LoRA.
    Open choices: plain momentum, not Nesterov's, as in the paper's equation. Defaults: server_lr 1 and momentum 0.5
    (the paper: 0.9): with momentum b the steps add up to 1/(1-b) times FedAvg's, and ten times is too far for the
    few rounds in which LoRA is trained.
    """

    name = "fedavgm"
    summary = "FedAvg with momentum on the server"
    source = "Hsu et al., arXiv 1909.06335"
    budget_note = (
        "FedAvg's steps, and no rows for a search; its paper's momentum, by default 0.5 instead of 0.9, not "
        "OpenFedLLM's variant: that scales each change by 1 - momentum after the first round"
    )

    class Options(Method.Options):
        """Settings of the server's step."""

        server_lr: float = Field(1.0, gt=0)
        """The server's learning rate."""
        momentum: float = Field(0.5, ge=0, lt=1)
        """Share of the last round's step that is kept; 0 with server_lr 1 is FedAvg."""

    options: Options

    def start(self, server: Server) -> None:
        """Initialize the momentum."""
        server.memory["momentum"] = torch.zeros(server.shared.size)

    def step(self, server: Server, mean: Vector) -> Vector:
        """Return the weights after one step on the clients' mean."""
        x = torch.from_numpy(server.shared.vector)
        momentum = self.options.momentum * server.memory["momentum"] + (torch.from_numpy(mean) - x)
        server.memory["momentum"] = momentum
        following: Vector = (x + self.options.server_lr * momentum).numpy()
        return following


class FedYogi(AdaptiveMethod):
    """FedAvg on attention LoRA with Yogi's step on the server: v grows as in Adam, but shrinks slowly.

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
    budget_note = FedAdam.budget_note

    class Options(FedAdam.Options):
        """Settings of the server's step, as FedAdam's."""

    options: Options

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Move the second moment towards the squared change by an amount that does not depend on its distance."""
        return v - (1 - self.options.beta_2) * squared * (v - squared).sign()
