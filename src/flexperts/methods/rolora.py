"""RoLoRA: rounds alternate between LoRA's factors, so that each round's mean is exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from flexperts.communication.average import holders_mean
from flexperts.communication.messages import Update
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.vector import Manifest, Payload
from flexperts.training.local import TrainResult


class RoLoRA(Method):
    """One global LoRA; odd rounds train and average B with A frozen, even rounds A with B frozen.

    Source: RoLoRA (NeurIPS 2025).
    W = W0 + s B A.  Odd rounds: B <- sum_i p_i B_i;  even rounds: A <- sum_i p_i A_i;  p_i = n_i / n.
    sum_i p_i (B_i A) = (sum_i p_i B_i) A, and the same for A: with one factor frozen, each mean is exact.
    Trained: one factor of attention LoRA in each round. Sent: that factor up, half of LoRA's bytes; both down.
    Aggregated: mean by rows of that factor; the other does not change. Stays: nothing. Inference: the global LoRA.
    Open choices: rounds count from 1, so B trains first: A could not learn while B is zero. Both factors go down,
    so that a client that missed rounds needs nothing else. Replies are not all of the broadcast weights, so
    clipping, noise, compression and robust rules are refused. The learning rate's cosine is over all rounds, for
    both factors.
    """

    name = "rolora"
    summary = "LoRA's B trained and averaged in odd rounds, A in even rounds: exact means; nothing personal"
    source = "RoLoRA, NeurIPS 2025"
    sends = "B of attention LoRA in odd rounds, A in even rounds"
    additive = False
    plan_note = "memory counts gradients and moments of both factors; a round has those of one"

    def train(self, turn: Turn) -> TrainResult:
        """Train the round's factor."""
        return turn.fit(trains=lambda name: _factor(turn.round) in name)

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return the round's factor."""
        return _of_round(turn.split.shared, turn.round)

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare the factor of the coming round."""
        return Manifest.of(_of_round(server.shared.tensors(), server.round + 1))

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average the round's factor; the other does not change."""
        server.shared = Payload.of(holders_mean(server.shared.tensors(), updates))


def _factor(number: int) -> str:
    return ".lora_B." if number % 2 else ".lora_A."


def _of_round(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if _factor(number) in name}
