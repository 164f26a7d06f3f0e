"""HetLoRA: clients of different ranks prune themselves; zero-padded factors are averaged by norms of products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from pydantic import Field
from torch import Tensor

from flexperts.communication.average import capped, checked
from flexperts.communication.messages import DERIVED, Update
from flexperts.errors import incompatible
from flexperts.methods.kit.ranks import (
    Factors,
    RankedMethod,
    clear_from,
    cut,
    factors,
    named,
    padded,
    rank_of,
)
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.vector import Manifest, Payload
from flexperts.training.local import StepHooks, TrainResult

_RANK = "rank."
_NEXT_RANK = f"{DERIVED}rank"


class HetLoRA(RankedMethod):
    """One global LoRA; every client trains as many rows as its rank, and prunes rows that it does not need.

    Source: arXiv 2401.06432 (EMNLP 2024).
    Client i gets the first r_i rows of A and columns of B and minimises F_i + lambda sum_l ||B[:,t:]|| ||A[t:]||,
    t = floor(gamma r_i). Where that sum has shrunk since the client received it, r_i <- t. Server, zeros up to r:
    A <- sum_i S_i A_i, B <- sum_i S_i B_i,  S_i = ||B_i A_i||_F / sum_j ||B_j A_j||_F.
    Trained: attention LoRA at the client's rank, which can only shrink. Sent: A and B at the rank that the client
    had received, and one number, its next rank: rows that it has just pruned are sent once more, as zeros.
    Aggregated: as above. Stays: nothing. Inference: the global LoRA cut to the client's rank.
    Open choices: a client has one rank, so norms are over the whole model: ||BA||_F is the root of the sum of the
    layers' squares, the tail is the sum of the layers' products. Weights are S_i alone, without the number of rows,
    as in the source; if all S_i are zero, weights are the rows. In round 1 nothing can shrink, as B starts at zero.
    Rows that no client of a round holds keep their values: averaged with zeros, A and B would both be zero and
    never train again. The server keeps each client's rank, because it has to know what to send. Rows that few
    clients hold are pulled to zero by the others: that is the source's rule.
    """

    name = "hetlora"
    one_global = False
    summary = "LoRA of any ranks, self-pruned, averaged with zeros by the norm of the product; nothing personal"
    source = "EMNLP 2024, arXiv 2401.06432"
    sends = "attention LoRA and its next rank"
    plan_note = "bytes are an upper bound: ranks shrink as clients prune"

    class Options(RankedMethod.Options):
        """Ranks and pruning."""

        gamma: float = Field(0.99, gt=0, le=1)
        """Share of its rank that a client keeps when it prunes; 1 = no pruning."""
        penalty: float = Field(1e-3, ge=0)
        """lambda, strength of the penalty on the rows that would be pruned."""
        min_rank: int = Field(1, ge=1)
        """Lowest rank to which a client prunes."""

    options: Options

    def tail(self, rank: int) -> int:
        """Return the row where a rank's tail starts; the rank itself if there is no tail."""
        gamma, least = self.options.gamma, self.options.min_rank
        return min(rank, max(math.floor(gamma * rank + 1e-9), least))  # 0.29 * 100 is 28.999...

    def train(self, turn: Turn) -> TrainResult:
        """Train with the penalty on the tail, and prune the tail if it shrank."""
        rank = rank_of(turn.received)
        tail = self.tail(rank)
        result = turn.fit(hooks=StepHooks(penalty=self._penalty(turn, tail) if tail < rank else None))
        if tail_product(turn.split.shared, tail) < tail_product(turn.received, tail):
            clear_from(turn.split.shared, tail)
            rank = tail
        turn.memory["rank"] = torch.tensor([float(rank)])
        return result

    def _penalty(self, turn: Turn, tail: int) -> Callable[[], Tensor] | None:
        strength = self.options.penalty
        return (lambda: strength * tail_product(turn.split.shared, tail)) if strength else None

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return the factors at the received rank, and the client's next rank."""
        return cut(turn.split.shared, rank_of(turn.received)) | {_NEXT_RANK: turn.memory["rank"]}

    def rank(self, server: Server, client: str) -> int:
        """Return the rank that the client last reported; before that, the recipe's."""
        told = server.memory.get(_RANK + client)
        return super().rank(server, client) if told is None else int(told)

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare factors of the client's rank, and its next rank."""
        return Manifest.of(cut(server.shared.tensors(), self.rank(server, client)) | {_NEXT_RANK: torch.zeros(1)})

    def regroup(self, server: Server) -> None:
        """Forget the ranks of clients that have left."""
        server.forget_departed(_RANK)

    def check_update(self, server: Server, update: Update) -> None:
        """Refuse a rank that the client cannot have."""
        _told_rank(update)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average by the norms of the products; rows that no client holds stay."""
        current = server.shared.tensors()
        norms, rows, arrived, top = [], [], [], 0
        for update in checked(updates):
            tensors = update.tensors()
            kept = _told_rank(update)
            server.memory[_RANK + update.client], top = torch.tensor(kept), max(top, kept)
            norms.append(product_norm(factors(tensors)))
            rows.append(float(update.rows))
            arrived.append(padded(tensors, rank_of(current)))
        weights = capped(norms, server.max_share)
        if not sum(weights):  # of one product that is not zero, no share can be taken
            weights = capped(rows, server.max_share)
        shares = [(w / sum(weights), each) for w, each in zip(weights, arrived, strict=True)]
        mean = {n: torch.stack([w * each[n] for w, each in shares]).sum(0) for n in current}
        server.shared = Payload.of(_beyond(mean, current, top))


def tail_product(tensors: Mapping[str, Tensor], start: int) -> Tensor:
    """Return sum over layers of ||B[:, start:]||_F ||A[start:]||_F."""
    norm = torch.linalg.vector_norm
    return torch.stack([norm(B[:, start:]) * norm(A[start:]) for A, B in factors(tensors).values()]).sum()


def product_norm(by_layer: Factors) -> float:
    """Return ||B A||_F over all layers, without the products: ||B A||_F^2 = sum (B^T B) * (A A^T)."""
    pairs = [(A.double(), B.double()) for A, B in by_layer.values()]
    squares = [((B.T @ B) * (A @ A.T)).sum() for A, B in pairs]
    return float(torch.stack(squares).sum().clamp(min=0).sqrt())


def _beyond(mean: Mapping[str, Tensor], current: Mapping[str, Tensor], top: int) -> dict[str, Tensor]:
    """Return the mean's rows below ``top`` and the current ones from there on."""
    old = factors(current)
    return named(
        {
            layer: (torch.cat([A[:top], old[layer][0][top:]]), torch.cat([B[:, :top], old[layer][1][:, top:]], 1))
            for layer, (A, B) in factors(mean).items()
        }
    )


def _told_rank(update: Update) -> int:
    """Return the client's next rank."""
    tensors = update.tensors()
    told, most = tensors[_NEXT_RANK].item(), rank_of(tensors)
    if told not in range(1, most + 1):
        raise incompatible(
            f"{update.client} reports the next rank {told:g}",
            f"it must be a whole number from 1 to {most}, its rank in this round",
        )
    return int(told)
