"""FDLoRA: local training, then an outer optimizer on the server, and two adapters fused at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import minimize
from torch import Tensor

from flexperts.methods.kit.method import Method, OnBatch, State
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.vector import Vector
from flexperts.training.local import TrainResult

Loss = Callable[[float, float], float]
_THETA_P = "own."
_MOMENTUM = "momentum"
_FUSION = "fusion"


class FDLoRA(Method):
    """One LoRA per client from local training and one from the federation, fused by two weights at inference.

    Source: Qi et al., 2024 (arXiv 2406.07925); no official code, details as in FedAMoLE's re-implementation.
    Stage 1 (round 1): theta_p^i by steps from the common start; theta_s = sum_i p_i theta_p^i, p_i = n_i / n.
    Stage 2 (rounds 2..R): theta_s^i by steps from theta_s; d = sum_i p_i (theta_s - theta_s^i); v <- mu v + d;
    theta_s <- theta_s - eta (d + mu v); in every H-th of these rounds theta_p^i <- theta_s^i.
    Stage 3 (AdaFusion): theta = w1 theta_s + w2 theta_p on A and on B alike, w in [-1.5, 1.5]^2 minimising
    CE(few own rows) + 0.05 mean|w|, without gradients.
    Trained: attention LoRA. Sent: all of it, also in stage 1. Aggregated: mean by rows, then from round 2
    Nesterov momentum. Stays: nothing secret: the client keeps theta_p, but the server has seen it, since it was
    sent. Inference: personalized = fused theta; global = theta_s.
    Open choices: the paper leaves open outer rate, momentum and search budget; eta = 1, mu = 0.5 and H = 5 are the
    re-implementation's. v follows torch.optim.SGD (v = d in its first step, so that step is 1 + mu times d). H
    counts rounds from the first of stage 2. All clients take part in round 1, since each needs a theta_p; a client
    that is not sampled in an H-th round keeps its old theta_p, and one that was away in round 1 or came later has
    theta_p = theta_s until its first H-th round. The search is scipy's Nelder-Mead (the
    re-implementation: Nevergrad, budget 5). It starts from the triangle w = (0, 0), (1, 0), (0, 1), since from 0
    alone its steps would vanish: the result is never worse than base, theta_s or theta_p on the rows. These are
    train rows, not a held-out split. The mean is by rows; the re-implementation averages uniformly.
    """

    name = "fdlora"
    summary = "locally trained LoRA and outer-optimized global LoRA, fused by two searched weights per client"
    source = "Qi et al., 2024, arXiv 2406.07925"
    keeps = "a copy of an attention LoRA that it has sent"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")
    settles = True
    budget_note = (
        "FedAvg's steps, but all clients train in round 1; afterwards each client searches two fusion weights in "
        "fusion_budget loss evaluations ({fusion_budget}) on fusion_rows of its train rows ({fusion_rows}), not on "
        "held-out rows; outer rate and momentum are a re-implementation's, whose search has 5 evaluations: there "
        "is no official code"
    )

    class Options(Method.Options):
        """Outer optimizer and fusion."""

        sync_every: int = Field(5, ge=1)
        """H: after every H rounds of stage 2, a client's own LoRA is replaced by its trained global one."""
        server_lr: float = Field(1.0, gt=0)
        """eta, rate of the outer step."""
        momentum: float = Field(0.5, ge=0, lt=1)
        """mu, Nesterov momentum of the outer step."""
        fusion_rows: int = Field(8, ge=1)
        """Own train rows on which the fusion weights are searched."""
        fusion_budget: int = Field(20, ge=3)
        """Loss evaluations of the search."""
        fusion_penalty: float = Field(0.05, ge=0)
        """Factor of mean|w| in the searched loss."""

    options: Options

    @property
    def full_rounds(self) -> int:
        """Round 1, stage 1: each client needs a theta_p."""
        return 1

    def train(self, turn: Turn) -> TrainResult:
        """Train from the received LoRA; keep a copy in stage 1 and in every H-th round of stage 2."""
        result = turn.fit()
        if (turn.round - 1) % self.options.sync_every == 0:
            turn.memory |= {f"{_THETA_P}{n}": p.detach().clone() for n, p in turn.split.shared.items()}
        return result

    def step(self, server: Server, mean: Vector) -> Vector:
        """Return the mean in stage 1, and the result of an outer step towards it in stage 2."""
        if server.round == 0:
            return mean
        gradient, before = server.shared.vector - mean, server.memory.get(_MOMENTUM)
        velocity = gradient if before is None else self.options.momentum * before.numpy() + gradient
        server.memory[_MOMENTUM] = torch.from_numpy(velocity)
        change = self.options.server_lr * (gradient + self.options.momentum * velocity)
        return np.asarray(server.shared.vector - change, dtype=np.float32)

    def settle(self, turn: Turn) -> dict[str, Tensor]:
        """Return the fusion weights ``[2]``, fp64; the turn's LoRA is restored."""
        common, own = self._loras(turn)
        try:
            return {_FUSION: torch.tensor(self._weights(turn, common, own), dtype=torch.float64)}
        finally:
            turn.load(common)

    def _loras(self, turn: Turn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return theta_s and theta_p."""
        common = {n: p.detach().clone() for n, p in turn.split.shared.items()}
        return common, {n: turn.memory.get(f"{_THETA_P}{n}", common[n]) for n in common}

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Compute with the fused LoRA in the personalized state."""
        with super().in_state(turn, state) as on_batch:
            if state != "personalized":
                yield on_batch
                return
            common, own = self._loras(turn)
            w1, w2 = (turn.settled or self.settle(turn))[_FUSION].tolist()
            try:
                turn.load(fused(common, own, w1, w2))
                yield on_batch
            finally:
                turn.load(common)

    def _weights(self, turn: Turn, common: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[float, float]:
        """Search the weights on a few of the client's rows, which are always the same."""
        examples = turn.site.examples
        order = torch.randperm(len(examples), generator=turn.site.generator("fusion"))
        rows = [examples[i] for i in order[: self.options.fusion_rows].tolist()]

        @torch.no_grad()
        def loss(w1: float, w2: float) -> float:
            turn.load(fused(common, own, w1, w2))
            return sum(part.item() for part in turn.objective(turn.model, rows, turn.settings))

        return search(loss, self.options.fusion_budget, self.options.fusion_penalty)


def fused(common: Mapping[str, Tensor], own: Mapping[str, Tensor], w1: float, w2: float) -> dict[str, Tensor]:
    """Return w1 theta_s + w2 theta_p, tensor by tensor."""
    return {name: w1 * tensor + w2 * own[name] for name, tensor in common.items()}


def search(loss: Loss, budget: int, penalty: float) -> tuple[float, float]:
    """Return the w in [-1.5, 1.5]^2 with the lowest loss + penalty mean|w| found in ``budget`` evaluations.

    Deterministic and without gradients.
    """
    found = minimize(
        lambda w: loss(float(w[0]), float(w[1])) + penalty * float(np.abs(w).mean()),
        np.zeros(2),
        method="Nelder-Mead",
        bounds=[(-1.5, 1.5)] * 2,
        options={"maxfev": budget, "initial_simplex": [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]},
    )
    w1, w2 = found.x.tolist()
    return w1, w2
