"""FedALT: a client's own LoRA and the mean of all others' LoRAs, mixed for every token."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from flexperts.communication.average import checked
from flexperts.communication.messages import Update
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.parameters.vector import Payload
from flexperts.parts.part import Part
from flexperts.parts.routed_lora import RoutedLora
from flexperts.training.local import TrainResult

_PART = "mixture"
_REST, _OWN = ".experts.0.", ".experts.1."
"""In parameter names: the pair of the rest of the world, and the client's own."""
_LAST, _TOTAL = "last.", "total"
"""In the server's memory: what a client sent last, ``last.<client>``, and the sum of all of these; flat vectors."""


class FedALT(Method):
    """An own LoRA, and the mean of all other clients' LoRAs, mixed for every token by the client's own router.

    Source: Bian et al., AAAI 2026 (arXiv 2503.11880), with its official code.
    y = W x + s (m_0 B_0 A_0 x + m_1 B_1 A_1 x), m = softmax(R x) in R^2, R without bias; s = alpha / r.
    Client k: A_1, B_1, R <- steps with A_0, B_0 fixed. Server: A_0 of k = mean_{j != k} A_1 of j, B_0 likewise;
    every client counts once, whatever its rows.
    Trained: the own pair A_1, B_1 and the router R of every adapted layer, together. Sent: the own pair.
    Aggregated: for each client, the mean of the other clients' pairs. Stays: R; the client also keeps its own pair,
    which nothing that it receives replaces. Inference: as trained, with the others' mean after the last round.
    Open choices: a client that does not take part in a round counts with the pair that it sent last; one that never
    took part is left out of the mean, because its B is zero. As long as no other client has sent a pair, A_0 and
    B_0 are the common start, with B_0 at zero. A_1 and R start alike on all clients; in the released code each
    draws its own A_1, but means of factors are closer to means of products if the factors start alike. R trains at
    training.personal_lr, which is training.lr unless it is set; training.personal_moments = "kept" keeps moments of
    R alone, since the own pair is sent. A client that joins a finished run trains its pair and R on the mean of all
    clients, and sends nothing. The mean of few pairs hides little: with two clients, each receives the other's pair
    as it is. The server keeps a pair per client.
    """

    name = "fedalt"
    summary = "an own LoRA and the mean of the others', mixed for every token by a personal router"
    source = "Bian et al., AAAI 2026, arXiv 2503.11880"
    sends = "own LoRA pair of every adapted layer"
    keeps = "router between the two LoRA pairs, of every adapted layer"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")
    one_global = False
    additive = False

    # A client.

    def parts(self, site: Site) -> dict[str, Part]:
        """Return two LoRA pairs and a router for every adapted layer."""
        lora = site.config.lora
        pairs = RoutedLora(
            site.lora.base,
            site.lora.targets,
            experts=2,
            slots=2,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            seed=site.config.seed,
        )
        return {_PART: pairs}

    def trains(self, name: str) -> bool:
        """Return whether a parameter is of the own pairs or a router; PEFT's adapter stays at zero."""
        return name.startswith(f"{_PART}.") and _REST not in name

    def shared(self, names: Collection[str]) -> set[str]:
        """Return the names of the own pairs."""
        return {name for name in names if _OWN in name}

    def receive(self, turn: Turn) -> None:
        """Load the others' mean; the own pair is what the client itself has trained."""
        turn.load(turn.received, {n: p for n, p in turn.split.frozen.items() if n.startswith(f"{_PART}.")})
        if turn.memory:
            turn.load(turn.memory)

    def train(self, turn: Turn) -> TrainResult:
        """Train the own pair and the router, and keep the pair for the next round."""
        result = turn.fit()
        turn.memory |= {n: p.detach().clone() for n, p in turn.split.shared.items()}
        return result

    def personalize(self, turn: Turn) -> TrainResult:
        """Train as in a round: the own pair is a newcomer's, too."""
        return self.train(turn)

    # The server.

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the mean of the other clients' last pairs; the common start if there is none."""
        names = tuple(name.replace(_OWN, _REST) for name in server.shared.manifest.names)
        rest = Payload(replace(server.shared.manifest, names=names), server.shared.vector)
        own = server.memory.get(_LAST + client)
        others = len(_last(server)) - (own is not None)
        if not others:
            return rest
        total = server.memory[_TOTAL]
        mean = (total if own is None else total - own) / others
        return replace(rest, vector=mean.float().numpy())

    def regroup(self, server: Server) -> None:
        """Forget the pairs of clients that have left."""
        server.forget_departed(_LAST)
        _add_up(server)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Keep every participant's pair."""
        # A lazy grid asks for a broadcast when its client's turn comes, so the memory changes after the last one.
        sent = {_LAST + update.client: torch.from_numpy(update.vector.copy()) for update in checked(updates)}
        server.memory |= sent
        _add_up(server)

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return nothing: every client has pairs of its own."""
        return {}


def _last(server: Server) -> list[str]:
    """Return the names in the server's memory of the pairs that it has, sorted."""
    return sorted(name for name in server.memory if name.startswith(_LAST))


def _add_up(server: Server) -> None:
    """Store the sum of all pairs in fp64, from which every client's own pair is then subtracted."""
    total = torch.zeros(server.shared.size, dtype=torch.float64)
    for name in _last(server):
        total += server.memory[name]
    server.memory[_TOTAL] = total
