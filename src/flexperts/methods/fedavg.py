"""FedAvg on attention LoRA: the same shared part as FLEx, and nothing personal."""

from __future__ import annotations

from flexperts.methods.kit.method import Method


class FedAvg(Method):
    """One global LoRA, averaged by rows.

    Source: McMahan et al., AISTATS 2017, on LoRA factors as in FedIT (arXiv 2305.05644).
    theta <- sum_i p_i theta_i, p_i = n_i / n over the round's participants; theta = all A and B.
    Trained: attention LoRA. Sent: attention LoRA. Aggregated: its mean by rows; A and B each, so their product is
    averaged only approximately. Stays: nothing. Inference: the global LoRA.
    Open choices: a new AdamW in every round, and one cosine over all rounds.
    """

    name = "fedavg"
    summary = "attention LoRA averaged; nothing personal"
    source = "McMahan et al., AISTATS 2017, on LoRA as in arXiv 2305.05644"
