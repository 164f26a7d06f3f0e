"""pFedMoE for language models: a shared and a personal low-rank expert per MoE layer, mixed by a personal gate."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from pydantic import Field

from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.turn import Site
from flexperts.parts.gated_adapters import GatedAdapters
from flexperts.parts.part import Part

_PART = "gated"


class PFedMoEStyle(Method):
    """A shared expert G and a personal expert F parallel to every MoE layer, mixed per token by a personal gate.

    Source: pFedMoE (Yi et al., 2024, arXiv 2402.01350), in the low-rank form of CoMiGS (arXiv 2409.13931).
    y = MoE(x) + a_1(x) G(x) + a_2(x) F(x), a(x) = softmax(W2 sigmoid(W1 x)); G, F = (alpha / r) up(down(x)).
    G <- sum_i p_i G_i, p_i = n_i / n.
    Trained: G, F and gate of every MoE layer, together. Sent: G only. Aggregated: mean of down and of up by rows.
    Stays: F and gate. Frozen: all pretrained weights. Inference: personalized = global G with own F and gate;
    global = G alone at weight 1 (the softmax over the one expert that is left).
    Open choices: an adaptation, hence "style": the paper mixes two small networks' features before a personal
    classifier head; here the pair's output is added to the routed output of a frozen base, without a personal head.
    Attention LoRA is not used, so all trained parameters are in the experts: at r = 8 and width D, G sends 16 D
    values per MoE layer; set ``rank`` to compare with other methods at equal bytes. Training weights G by a_1 < 1;
    the global state has it at weight 1. up starts at 0; G, F and gate start alike on all clients. The gate learns
    on train data, with the experts (CoMiGS itself: on validation data).
    """

    name = "pfedmoe_style"
    summary = "a shared and a personal low-rank expert per MoE layer, mixed by a personal token gate"
    source = "Yi et al., 2024, arXiv 2402.01350; form of arXiv 2409.13931"
    sends = "shared low-rank expert of every MoE layer"
    keeps = "personal low-rank expert and gate of every MoE layer"
    needs_experts = True
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")
    budget_note = (
        "FedAvg's steps, and no rows for a search; an adaptation of pFedMoE in CoMiGS's low-rank form: experts "
        "next to a frozen base, no attention LoRA, no personal head; the gate learns on train rows (CoMiGS: on "
        "validation rows)"
    )

    class Options(Method.Options):
        """Sizes of experts and gate."""

        rank: int = Field(8, ge=1)
        """r of both experts."""
        alpha: float = Field(16.0, gt=0)
        """Scaling numerator: an expert's output is multiplied by alpha / r."""
        gate_width: int = Field(8, ge=1)
        """Width of the gate's inner layer."""

    options: Options

    def parts(self, site: Site) -> dict[str, Part]:
        """Return a gated pair for every MoE layer."""
        options = self.options
        pairs = GatedAdapters(
            site.experts,
            rank=options.rank,
            alpha=options.alpha,
            gate_width=options.gate_width,
            generator=site.common_generator(_PART),
            dropout=site.config.lora.dropout,
        )
        return {_PART: pairs}

    def trains(self, name: str) -> bool:
        """Return whether a parameter is of the pairs; attention LoRA stays at its start, where it adds nothing."""
        return name.startswith(f"{_PART}.")

    def shared(self, names: Collection[str]) -> set[str]:
        """Return the names of G's parameters."""
        return {name for name in names if name.split(".")[-2] == "shared"}
