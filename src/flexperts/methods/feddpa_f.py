"""FedDPA-F: the local adapter is fine-tuned once, after the federation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.errors import FederationError
from flexperts.methods.feddpa import FedDPA
from flexperts.methods.server import Server
from flexperts.methods.turn import Site, Turn
from flexperts.parameters.payload import Payload
from flexperts.parameters.vector import Manifest
from flexperts.training.local import TrainResult


class FedDPAF(FedDPA):
    """FedAvg on a global LoRA; then each client fits a local LoRA beside it, once.

    Source: Yang et al., NeurIPS 2024 (arXiv 2403.19211), FedDPA-F, with its official code.
    Rounds 1..R: g <- sum_i p_i g_i, g_i by steps on W0 + dW_g, p_i = n_i / n (FedAvg). dW = s B A.
    Then one round more: l_i <- steps on W0 + a dW_l + (1 - a) dW_g, g final and fixed.
    Inference as FedDPA-T: y = W0 x + (1 - alpha) dW_g x + alpha dW_l x, alpha = lam mean_s cos(h(x), h(x_s)).
    Trained: the global LoRA g in rounds 1..R, the local LoRA l in round R+1. Sent: g in rounds 1..R, nothing in the
    last. Aggregated: mean of A and of B by rows. Stays: l. Inference: personalized = the weighted sum above, one
    alpha per row, for generation and for scores; global = g alone.
    Open choices: those of feddpa_t (weights reversed and bypassed in the released code, x_s, no clamp). The source
    names no number of steps for l: ours is all rounds' steps together, with a learning-rate schedule of its own, so
    that both variants cost about the same. In the extra round all clients train, also where only a share is sampled
    per round: each needs its l. The server learns R from the clients' reports, which must agree.
    """

    additive = False

    name = "feddpa_f"
    summary = "FedAvg, then a local LoRA fitted beside the finished global one, weighted by each input's likeness"

    def extra_rounds(self, rounds: int) -> int:
        """One round after the recipe's."""
        return 1

    def report(self, site: Site) -> Any:
        """Tell how many rounds the federation has."""
        return site.config.federation.rounds

    def agree(self, reports: Mapping[str, Any]) -> Any:
        """Return the number of rounds that all clients have in their recipe.

        Raises:
            FederationError: They differ.
        """
        rounds = set(reports.values())
        if len(rounds) != 1:
            raise FederationError(
                f"federation.rounds = {sorted(rounds)}", "all clients run one recipe", "hand it out"
            )
        return rounds.pop()

    def train(self, turn: Turn) -> TrainResult:
        """Train g in the recipe's rounds, l in the extra one."""
        rounds = turn.site.config.federation.rounds
        if turn.round <= rounds:
            return turn.fit(personal=False)
        steps = rounds * turn.settings.steps
        return self.personalize(turn, replace(turn.settings, steps=steps, first_step=0, total_steps=steps))

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Send g, and nothing after the extra round."""
        return turn.split.shared if turn.round <= turn.site.config.federation.rounds else {}

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """All clients take part in the extra round."""
        return sorted(server.clients) if _federated(server) else sampled

    def uplink(self, server: Server, client: str) -> Manifest:
        """Expect nothing in the extra round."""
        return Payload.empty().manifest if _federated(server) else super().uplink(server, client)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Leave g as it is in the extra round, and wait for all clients."""
        if not _federated(server):
            super().aggregate(server, updates)
            return
        for _ in updates:
            pass


def _federated(server: Server) -> bool:
    """Tell whether all of the recipe's rounds are finished."""
    return server.round >= int(server.agreement)
