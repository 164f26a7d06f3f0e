"""FedEx-LoRA: LoRA's factors are averaged, and what the mean of the products has besides is added to the base."""

from __future__ import annotations

from flexperts.methods.kit.carried import ExactMean


class FedExLoRA(ExactMean):
    """FedAvg on attention LoRA with an exact mean: a residual corrects the product of the averaged factors.

    Source: FedEx-LoRA (ACL 2025).
    A' = sum_i p_i A_i, B' = sum_i p_i B_i, p_i = n_i / n;  W <- W + s (sum_i p_i B_i A_i - B' A'), s = alpha / r.
    So W + s B' A' is W + s sum_i p_i B_i A_i: all clients compute with the exact mean of their models.
    Trained: attention LoRA. Sent: A_i and B_i up; down A', B' and the residual of the last round, once, as factors
    of rank up to the sum of the clients' ranks (a client that missed rounds gets their residuals too). Aggregated:
    factors by rows; the residual as above. Stays: nothing personal, but each client keeps the sum of all residuals.
    Inference: the base with that sum and the global LoRA.
    Open choices: the source averages clients uniformly; here by rows. It adds the residual to W as a matrix; here
    the base never changes, so that a base of any storage type serves all clients. The sum of all residuals is one
    frozen low-rank update beside it, multiplied out where its rank would exceed min(in, out), so that it does not
    grow with rounds. The residual is sum_{i<K} p_i (B_i - B_K) (A_i - A'), which is the same, without the rank of
    one client and without the cancellation of large terms. Every evaluation sends the whole sum. The adapter folder
    holds LoRA and the sum as one LoRA.
    """

    name = "fedex_lora"
    summary = "LoRA averaged, and the rest of the mean of the products sent once: an exact mean; nothing personal"
    source = "FedEx-LoRA, ACL 2025"
