"""FLEx: selective aggregation, expert grafting, adaptive gate."""

from __future__ import annotations

from flexperts.methods.base import Method


class Flex(Method):
    """Personal experts beside shared attention LoRA.

    Source: arXiv 2506.00965 (selective aggregation, expert grafting, adaptive gate).
    Trained: attention LoRA, the k personal experts of every MoE layer and their sigmoid gate, together.
    Sent and averaged by rows: attention LoRA. Stays: experts and gate. Frozen: all pretrained weights.
    Inference: last global LoRA with the client's own experts and gate.
    Left open by the source: the gate's start (ours: weight 0, bias ``graft.gate_bias``), and whether the personal
    expert trains whole or by a low-rank update (``graft.rank``).
    """

    name = "flex"
    summary = "attention LoRA averaged; one grafted personal expert and gate per MoE layer stay at home"
    source = "arXiv 2506.00965"
    grafts = True
    states = ("zero_shot", "global", "personalized")
