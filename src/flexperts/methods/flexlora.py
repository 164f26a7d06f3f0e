"""FlexLoRA: the clients' products are averaged and truncated to each client's rank by an SVD."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.methods.kit.ranks import RankedMethod, by_rows, factors, named, stacked
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload


class FlexLoRA(RankedMethod):
    """One global LoRA, averaged as a product; every client gets its best approximation at the client's rank.

    Source: arXiv 2402.11505 (NeurIPS 2024).
    dW = sum_i p_i s B_i A_i = U S V^T, p_i = n_i / n, s = alpha / r;  client i gets B = U_r S_r / s, A = V_r^T.
    Trained: attention LoRA at the client's rank. Sent: A and B at that rank, in both directions.
    Aggregated: the mean of the products by rows, exact up to the truncation to lora.rank. Stays: nothing.
    Inference: the global LoRA truncated to the client's rank; the adapter folder holds it at lora.rank.
    Open choices: components beyond lora.rank are dropped every round, as clients cannot hold them. dW is never
    formed: the SVD is that of the stacked factors, by two QR decompositions, in float64; s cancels. Signs are such
    that the largest entry of every row of A is positive. If a round's ranks sum to less than lora.rank, the rows of
    A without a singular vector keep their last values, with B = 0: set to zero they could never train again.
    """

    name = "flexlora"
    one_global = False
    summary = "LoRA of any ranks averaged as products, truncated to every client's rank by SVD; nothing personal"
    source = "NeurIPS 2024, arXiv 2402.11505"

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average the products and keep their best factors at full rank."""
        current = factors(server.shared.tensors())
        new = {layer: truncated(A, B, current[layer]) for layer, (A, B) in stacked(by_rows(updates)).items()}
        server.shared = Payload.of(named(new))


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
