"""FLoRA: clients' LoRA factors are stacked instead of averaged; the global update is exact for any ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor

from flexperts.communication.messages import DERIVED, Update
from flexperts.methods.kit.carried import by_module, empty_stack, forget_departed, noted, outdated, received_up_to
from flexperts.methods.kit.ranks import Factors, RankedMethod, by_rows, factors, named, stacked
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.parameters.vector import Payload
from flexperts.parts.part import Part, uniform_matrix
from flexperts.parts.stacked_lora import StackedLora

_STACK = "stack."


class FLoRA(RankedMethod):
    """Every round trains a new LoRA on top of the sum of all earlier ones.

    Source: arXiv 2409.05976 (NeurIPS 2024).
    A = [p_1 A_1; ...; p_K A_K], B = [B_1, ..., B_K], p_i = n_i / n:  s B A = sum_i p_i s B_i A_i, s = alpha / r.
    Round t computes with W0 + sum_{u<t} s B^u A^u; on top of it, each client trains A_i, B_i of its rank r_i.
    Trained: attention LoRA, initialized again in every round. Sent: A_i and B_i at rank r_i up; down the stack of
    the last round, of rank sum_i r_i (a client that missed rounds gets all their stacks). Aggregated: stacked,
    exact.
    Stays: nothing personal, but each client keeps a copy of all stacks. Inference: the base with all stacks.
    Open choices: the source merges each round's sum into W0; here the base never changes, so that a base of any
    storage type serves all clients. The stacks are kept next to the base as one frozen low-rank update whose rank
    grows by sum_i r_i a round: it costs the time and memory of a LoRA of that rank, and every evaluation sends all
    of it. In each round every client draws its own A (uniform as PEFT's), as in the release, and B starts at zero:
    with one A for all, the stack would start in a space of r dimensions instead of sum_i r_i. The learning rate's
    cosine is over all rounds, although LoRA is new in each round. The adapter folder holds all stacks as one LoRA
    of the summed rank.
    Not for few local steps per round or many rounds: B starts from zero in every round and does not get far, while
    the down-link grows with the number of clients and the model with the number of rounds.
    """

    name = "flora"
    summary = "new LoRA every round, clients' factors stacked: an exact sum at any ranks; nothing personal"
    source = "NeurIPS 2024, arXiv 2409.05976"
    sends_back = True
    plan_note = "memory and FLOPs are those of round 1; later rounds add a stack each to the model"

    def parts(self, site: Site) -> dict[str, Part]:
        """Return an empty delta for every adapted layer; ``receive`` fills it with the stacks."""
        return {"stacks": empty_stack(site)}

    def receive(self, turn: Turn) -> None:
        """Store the new stacks, load all of them, and start a new LoRA."""
        turn.memory.update({n.removeprefix(DERIVED): t.clone() for n, t in turn.received.items()})
        rounds = {_round(n) for n in turn.memory if n.startswith(_STACK)}
        if missing := set(range(1, max(rounds, default=0))) - rounds:
            raise outdated(turn, min(missing))
        cast(StackedLora, turn.parts["stacks"]).load(by_module(_all_rounds(turn.memory)))
        turn.load(self._fresh(turn))

    def _fresh(self, turn: Turn) -> dict[str, Tensor]:
        """Return the round's new LoRA: the client's own A; its rows beyond the client's rank, and B, are zero."""
        stream = turn.site.generator("flora", turn.round)
        rank = self.options.ranks.get(turn.site.client, turn.site.lora.rank)
        fresh: Factors = {}
        for layer, (A, B) in factors(turn.split.shared).items():
            drawn = uniform_matrix(A.shape[0], A.shape[1], stream).detach()
            drawn[rank:] = 0
            fresh[layer] = drawn, torch.zeros_like(B)
        return named(fresh)

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the stacks of the rounds that the client has not received."""
        return _stacks(server, received_up_to(server, client))

    def regroup(self, server: Server) -> None:
        """Forget what clients that have left had received."""
        forget_departed(server)

    def final(self, server: Server, client: str) -> Payload:
        """Return all stacks."""
        return _stacks(server, 0)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Stack the round's factors, and record which stacks each client has received."""
        whole = named(stacked(by_rows(noted(server, updates))))
        server.memory.update({f"{_STACK}{server.round + 1}.{n}": t for n, t in whole.items()})

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return all stacks as one adapter."""
        return named(_all_rounds(server.memory))


def _round(name: str) -> int:
    """Return the round of a stack's tensor, named ``stack.<round>.<LoRA's name>``."""
    return int(name.split(".", 2)[1])


def _stacks(server: Server, after: int) -> Payload:
    memory = server.memory.items()
    return Payload.of({DERIVED + n: t for n, t in memory if n.startswith(_STACK) and _round(n) > after})


def _all_rounds(memory: Mapping[str, Tensor]) -> Factors:
    """Return the stacks of all rounds joined into one."""
    each: dict[int, dict[str, Tensor]] = {}
    for name, tensor in memory.items():
        if name.startswith(_STACK):
            each.setdefault(_round(name), {})[name.split(".", 2)[2]] = tensor
    return stacked([(1.0, factors(each[number])) for number in sorted(each)])
