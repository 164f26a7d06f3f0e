"""FedAvg with LoRA on attention and on every routed expert: the fair baseline for personal experts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from flexperts.methods.kit.method import Method
from flexperts.methods.kit.turn import Site
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.part import Part


class FedAvgExperts(Method):
    """One global model with LoRA on all layers, experts included.

    Source: McMahan et al., AISTATS 2017, on LoRA factors of attention and of all routed experts.
    theta <- sum_i p_i theta_i over A and B of every adapted matrix, p_i = n_i / n.
    Trained: attention LoRA and LoRA on both projections of every routed expert, in place. Sent: all of it.
    Aggregated: mean by rows (A and B each, so products are averaged only approximately). Stays: nothing.
    Frozen: all pretrained weights, routers and shared experts. Inference: the global LoRA everywhere.
    Open choices: all clients start every expert from one common A, B at zero. An expert's LoRA has lora.rank unless
    ``rank`` is given, always with the scaling lora.alpha / lora.rank. An expert that a client's tokens never reach
    is sent unchanged and pulls the mean to the old value, in proportion to that client's rows.
    The adapter folder holds the attention part alone: PEFT's files cannot hold adapters of fused experts.
    """

    name = "fedavg_experts"
    summary = "LoRA on attention and on every routed expert, all averaged; nothing personal"
    source = "McMahan et al., AISTATS 2017, on LoRA everywhere"
    sends = "attention LoRA and all routed experts' LoRA"
    needs_experts = True

    class Options(Method.Options):
        """The experts' LoRA."""

        rank: Annotated[int, Field(ge=1)] | None = None
        """LoRA rank of every routed expert; without it, lora.rank."""

    options: Options

    def parts(self, site: Site) -> dict[str, Part]:
        """Return LoRA on every expert of every layer."""
        rank = self.options.rank or site.lora.rank
        every = {e.name: range(e.num_experts) for e in site.experts}
        alpha, stream = site.lora.scale * rank, site.common_generator("experts")
        dropout = site.config.lora.dropout
        return {"experts": ExpertAdapters(site.experts, every, rank, alpha, stream, dropout=dropout)}

    def shared(self, names: Collection[str]) -> set[str]:
        """Return all trained parameters: everything is shared."""
        return set(names)
