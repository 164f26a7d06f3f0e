"""FedAvg on attention LoRA: the same shared part as FLEx, and nothing personal."""

from __future__ import annotations

from flexperts.methods.base import Method


class FedAvg(Method):
    """One global LoRA, averaged by rows.

    Source: McMahan et al., AISTATS 2017, on LoRA factors as in FedIT (arXiv 2305.05644).
    Trained, sent and averaged: attention LoRA (A and B each, so the product is averaged only approximately).
    Stays: nothing. Inference: the global LoRA.
    """

    name = "fedavg"
    summary = "attention LoRA averaged; nothing personal"
    source = "McMahan et al., AISTATS 2017; arXiv 2305.05644"
