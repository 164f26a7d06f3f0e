"""LoRA of different ranks: cutting, zero padding, and the base class of methods whose clients differ in rank.

A client of rank r trains the first r rows of A and columns of B of an adapter of rank R >= r (``lora.rank``); the
other rows and columns are zero. They stay exactly zero: the gradient of a row of A has the same column of B as a
factor, and vice versa. The scaling alpha / R is the same for all ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from flexperts.communication.average import checked
from flexperts.communication.messages import Update
from flexperts.config.names import client_names
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.vector import Manifest, Payload

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer -> (A ``[r, in]``, B ``[out, r]``)."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


def factors(tensors: Mapping[str, Tensor]) -> Factors:
    """Return named LoRA tensors by layer."""
    layers = (name.removesuffix(_A) for name in sorted(tensors) if name.endswith(_A))
    return {layer: (tensors[layer + _A], tensors[layer + _B]) for layer in layers}


def named(by_layer: Factors) -> dict[str, Tensor]:
    """Return the factors of all layers as named tensors."""
    As = {layer + _A: A for layer, (A, _) in by_layer.items()}
    return As | {layer + _B: B for layer, (_, B) in by_layer.items()}


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of named LoRA tensors."""
    return next(len(A) for A, _ in factors(tensors).values())


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the first rows of every A and columns of every B, as views."""
    return named({layer: (A[:rank], B[:, :rank]) for layer, (A, B) in factors(tensors).items()})


def padded(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the factors, padded with zeros up to ``rank``."""
    missing = rank - rank_of(tensors)
    both = factors(tensors).items()
    return named({layer: (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) for layer, (A, B) in both})


@torch.no_grad()
def clear_from(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Set all rows of A and columns of B from ``rank`` on to zero, in place."""
    for A, B in factors(tensors).values():
        A[rank:] = 0
        B[:, rank:] = 0


def stacked(weighted: Sequence[tuple[float, Factors]]) -> Factors:
    """Return one pair (A, B) per layer with B A = sum_i w_i B_i A_i: A's stacked by rows, B's by columns."""
    layers = weighted[0][1] if weighted else ()
    return {
        layer: (
            torch.cat([weight * each[layer][0] for weight, each in weighted]),
            torch.cat([each[layer][1] for _, each in weighted], 1),
        )
        for layer in layers
    }


def truncated_mean(weighted: Sequence[tuple[float, Factors]], last: Factors) -> Factors:
    """Return the best factors of sum_i w_i B_i A_i at the rank of ``last``, the factors of the round before.

    The sum is never formed: see ``truncated``.
    """
    return {layer: truncated(A, B, last[layer]) for layer, (A, B) in stacked(weighted).items()}


def truncated(A: Tensor, B: Tensor, last: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factors V^T and U S of B A at the rank of ``last``; rows of its A fill up a lower rank.

    B A = Q_b R_b (Q_a R_a)^T = Q_b (R_b R_a^T) Q_a^T: the SVD of the small middle matrix is enough.

    Args:
        A: ``[R, in]``.
        B: ``[out, R]``.
        last: A ``[r, in]`` and B ``[out, r]`` of the round before.
    """
    basis_out, triangle_out = torch.linalg.qr(B.double())
    basis_in, triangle_in = torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(triangle_out @ triangle_in.T, full_matrices=False)
    rank = min(len(last[0]), len(S))
    new_A, new_B = Vt[:rank] @ basis_in.T, basis_out @ (U[:, :rank] * S[:rank])
    signs = new_A.gather(1, new_A.abs().argmax(1, keepdim=True)).sign()
    new_A, new_B = (new_A * signs).float(), (new_B * signs.T).float()
    return torch.cat([new_A, last[0][rank:]]), torch.cat([new_B, torch.zeros_like(last[1][:, rank:])], 1)


def by_rows(updates: Iterable[Update]) -> list[tuple[float, Factors]]:
    """Return every client's weight p_i = n_i / n and its factors, of any rank."""
    arrived = [(update.rows, factors(update.tensors())) for update in checked(updates)]
    total = sum(rows for rows, _ in arrived)
    return [(rows / total, each) for rows, each in arrived]


def _by_name(ranks: dict[str, int]) -> dict[str, int]:
    names = client_names(ranks)
    return {names[text]: rank for text, rank in ranks.items()}


class RankedMethod(Method):
    """Base of methods whose clients may differ in rank: each receives, trains and sends factors of its rank."""

    additive = False

    class Options(Method.Options):
        """Ranks by client."""

        ranks: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_by_name)] = Field({})
        """Client -> its LoRA rank, at most lora.rank; clients not named here have lora.rank."""

    options: Options

    def check(self, config: RunConfig) -> None:
        """Raise a ConfigError for ranks above the adapter's."""
        for client, rank in self.options.ranks.items():
            if rank > config.lora.rank:
                raise ConfigError(
                    f"method.options.ranks.{client} = {rank}",
                    f"a client's rank must be at most lora.rank = {config.lora.rank}",
                    "lower it or raise lora.rank",
                )

    def named_clients(self) -> Collection[str]:
        """Return the clients that have a rank of their own."""
        return self.options.ranks

    def rank(self, server: Server, client: str) -> int:
        """Return a client's rank in the coming round."""
        return self.options.ranks.get(client, rank_of(server.shared.tensors()))

    def receive(self, turn: Turn) -> None:
        """Load the received factors, padded with zeros."""
        turn.load(padded(turn.received, turn.site.lora.rank))

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return the factors, cut to the client's rank."""
        return cut(turn.split.shared, self.options.ranks.get(turn.site.client, turn.site.lora.rank))

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the global factors, cut to the client's rank."""
        return Payload.of(cut(server.shared.tensors(), self.rank(server, client)))

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare factors of the client's rank."""
        return Manifest.of(cut(server.shared.tensors(), self.rank(server, client)))
