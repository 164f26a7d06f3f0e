"""FlexLoRA: the clients' products are averaged and truncated to each client's rank by an SVD."""

from __future__ import annotations

from collections.abc import Iterable

from flexperts.communication.messages import Update
from flexperts.methods.kit.ranks import RankedMethod, by_rows, factors, named, truncated_mean
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
        server.shared = Payload.of(named(truncated_mean(by_rows(updates), factors(server.shared.tensors()))))
