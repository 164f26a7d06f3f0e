"""Frozen low-rank updates that are carried beside the base, and the exact mean of LoRA by such an update.

    sum_i p_i B_i A_i = B' A' + R,   A' = sum_i p_i A_i,  B' = sum_i p_i B_i,  R = sum_i p_i (B_i - B_K) (A_i - A')

K is the last client: any constant may be subtracted from the B_i, because the p_i (A_i - A') sum to zero. So R has
a rank of at most the sum of the other clients' ranks, and is exactly zero if all clients send the same.
Shapes: A ``[r, in]``, B ``[out, r]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from flexperts.communication.average import checked
from flexperts.communication.messages import DERIVED, Update
from flexperts.errors import FederationError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.ranks import Factors, factors, named, stacked
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.parameters.vector import Payload
from flexperts.parts.part import Part
from flexperts.parts.stacked_lora import StackedLora

_RECEIVED = "received."
_PART = "residual"
_SUM, _UP_TO = f"{_PART}.sum.", f"{_PART}_up_to"
"""Start of the names of the sum's factors; in a client's memory, the last round in its sum."""


def empty_stack(site: Site) -> StackedLora:
    """Return a frozen update of rank 0 on every adapted layer, at LoRA's scale."""
    adapted = {n: p for n, p in site.lora.parameters().items() if n.startswith(SHARED_PREFIX)}
    empty = {layer: (A[:0], B[:, :0]) for layer, (A, B) in by_module(factors(adapted)).items()}
    return StackedLora(site.lora.base, empty, site.lora.scale)


def by_module(by_layer: Factors) -> Factors:
    """Return factors of the shared LoRA by the names of the base's modules."""
    return {layer.removeprefix(f"{SHARED_PREFIX}model."): pair for layer, pair in by_layer.items()}


def noted(server: Server, updates: Iterable[Update]) -> Iterator[Update]:
    """Yield the updates; note that their clients have received what there was before the round."""
    for update in updates:
        server.memory[_RECEIVED + update.client] = torch.tensor(server.round)
        yield update


def received_up_to(server: Server, client: str) -> int:
    """Return the last round whose result a client has received; 0 if it has none."""
    return int(server.memory.get(_RECEIVED + client, 0))


def forget_departed(server: Server) -> None:
    """Forget what clients that have left had received."""
    server.forget_departed(_RECEIVED)


def outdated(turn: Turn, missing: int) -> FederationError:
    """Return the error of a client that has lost what the server sent it after a round."""
    return FederationError(
        f"{turn.site.client}: its stored state lacks what the server sent after round {missing}",
        "this is sent once, and the server has noted that it arrived",
        "stop the run, remove this client with `flexperts forget`, and resume: it joins again and gets all",
    )


def residual(weighted: list[tuple[float, Factors]], mean: Factors) -> Factors:
    """Return the factors of sum_i p_i B_i A_i - B' A', computed in float64.

    Args:
        weighted: Every client's p_i, of sum 1, and its factors.
        mean: A' and B'.
    """
    *others, (_, last) = weighted
    found = {}
    for layer, (mean_A, mean_B) in mean.items():
        A = [weight * (each[layer][0].double() - mean_A) for weight, each in others]
        B = [each[layer][1].double() - last[layer][1] for _, each in others]
        pair = torch.cat([mean_A[:0].double(), *A]), torch.cat([mean_B[:, :0].double(), *B], 1)
        found[layer] = bounded(*pair)
    return found


def bounded(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 factors with the same product, of a rank of at most min(in, out).

    Where the rank is larger, the product is computed in float64, and the other factor is the identity. An SVD would
    give the same sizes, and would round two factors instead of one.
    """
    width, height = A.shape[1], B.shape[0]
    if len(A) > min(width, height):
        product = B.double() @ A.double()
        one = torch.eye(min(width, height), device=A.device)
        A, B = (one, product) if width <= height else (product, one)
    return A.float(), B.float()


class ExactMean(Method):
    """Base of methods that average LoRA exactly: what the mean of the factors lacks is carried beside the base.

    ``class Mine(ExactMean, Other)`` gives this to a method whose ``aggregate`` is the mean by rows, and whose
    clients all send A and B of each layer whose LoRA is shared.

    The server sends each round's residual once, and every client adds it to its sum, in the order of the rounds and
    on the CPU, so that all have the server's bits. A client that needs more than the sum's size gets the sum. The
    sum has a rank of at most min(in, out), and the server keeps no more of single rounds than the size of the sum:
    memory does not grow with rounds.
    """

    additive = False
    sends_back = True
    plan_note = "memory and FLOPs are those of round 1; later rounds add the residual to the model"

    # A client.

    def parts(self, site: Site) -> dict[str, Part]:
        """Return the method's parts, and the residual's sum, which ``receive`` fills."""
        return {**super().parts(site), _PART: empty_stack(site)}

    def receive(self, turn: Turn) -> None:
        """Add the new residuals to the sum, load it, and then load the shared weights."""
        turn.memory |= {n: t.cpu() for n, t in turn.memory.items() if n.startswith(_SUM)}
        for number, new in sorted(_arrived(turn).items()):
            self._take(turn, number, new)
        cast(StackedLora, turn.parts[_PART]).load(by_module(_sum(turn.memory)))
        super().receive(turn)

    def _take(self, turn: Turn, number: int, new: Factors) -> None:
        """Add one round's residual; number 0 is the sum of all rounds."""
        before = int(turn.memory.get(_UP_TO, 0))
        if number == 0:
            number = turn.round - 1
            turn.memory |= _as_sum(new)
        elif number <= before:  # the reply to an earlier request was lost
            return
        elif number == before + 1:
            _add(turn.memory, new)
        else:
            raise outdated(turn, before + 1)
        turn.memory[_UP_TO] = torch.tensor(number)

    # The server.

    def regroup(self, server: Server) -> None:
        """Forget what clients that have left had received."""
        super().regroup(server)
        forget_departed(server)

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the shared weights, and the residuals that the client has not received."""
        missing = range(received_up_to(server, client) + 1, server.round + 1)
        single = {number: _of_round(server.memory, number) for number in missing}
        new = {n: t for tensors in single.values() for n, t in tensors.items()}
        return _with(super().broadcast(server, client), new if all(single.values()) else _whole(server))

    def final(self, server: Server, client: str) -> Payload:
        """Return the shared weights, and the sum of all residuals."""
        return _with(super().broadcast(server, client), _whole(server))

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average all shared weights by rows, and keep the residual of LoRA."""
        arrived = [(update.rows, update.tensors()) for update in noted(server, checked(updates))]
        total = sum(rows for rows, _ in arrived)
        sums = {n: sum(rows * tensors[n] for rows, tensors in arrived) for n in server.shared.manifest.names}
        mean = {n: cast(Tensor, tensor) / total for n, tensor in sums.items()}
        server.shared = Payload.of(mean)
        new = residual([(rows / total, factors(tensors)) for rows, tensors in arrived], factors(mean))
        _add(server.memory, new)
        server.memory |= {f"{_PART}.{server.round + 1}.{n}": t for n, t in named(new).items()}
        _drop_old(server)

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return the shared LoRA and the sum as one adapter, whose layers may differ in rank."""
        own, carried = factors(super().adapter(server)), _sum(server.memory)
        return named(stacked([(1.0, own), (1.0, carried)]) if carried else own)


def _with(payload: Payload, residuals: Mapping[str, Tensor]) -> Payload:
    return Payload.of(payload.tensors() | {DERIVED + n: t for n, t in residuals.items()})


def _arrived(turn: Turn) -> dict[int, Factors]:
    """Take the residuals out of what the server sent: round -> factors, with the sum as round 0."""
    names = [n for n in turn.received if n.startswith(f"{DERIVED}{_PART}.")]
    found: dict[int, dict[str, Tensor]] = {}
    for name in names:
        word, layer = name.removeprefix(f"{DERIVED}{_PART}.").split(".", 1)
        found.setdefault(0 if word == "sum" else int(word), {})[layer] = turn.received.pop(name).cpu()
    return {number: factors(tensors) for number, tensors in found.items()}


def _sum(memory: Mapping[str, Tensor]) -> Factors:
    return factors({n.removeprefix(_SUM): t for n, t in memory.items() if n.startswith(_SUM)})


def _as_sum(total: Factors) -> dict[str, Tensor]:
    return {_SUM + n: t.clone() for n, t in named(total).items()}


def _add(memory: dict[str, Tensor], new: Factors) -> None:
    """Add a residual to the sum in a memory."""
    before = _sum(memory)
    both = stacked([(1.0, before), (1.0, new)]) if before else new
    memory |= _as_sum({layer: bounded(*pair) for layer, pair in both.items()})


def _whole(server: Server) -> dict[str, Tensor]:
    return {n: t for n, t in server.memory.items() if n.startswith(_SUM)}


def _of_round(memory: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {n: t for n, t in memory.items() if n.startswith(f"{_PART}.{number}.")}


def _drop_old(server: Server) -> None:
    """Drop the residuals of rounds that a client would only need together with more than the sum's size."""
    room = sum(t.numel() for t in _whole(server).values())
    for number in range(server.round + 1, 0, -1):
        tensors = _of_round(server.memory, number)
        room -= sum(t.numel() for t in tensors.values())
        if room < 0:
            for name in tensors:
                del server.memory[name]
