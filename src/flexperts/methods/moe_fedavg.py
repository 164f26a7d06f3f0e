"""Full MoE and FedAvg: federated fine-tuning of all experts, without any saving."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from flexperts.methods.kit.method import Method
from flexperts.methods.kit.turn import Site, Turn
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.part import Part
from flexperts.training.local import TrainResult


class MoEFedAvg(Method):
    """Every routed expert is trained by every client and averaged: the naive baseline.

    Source: McMahan et al., AISTATS 2017, on all routed experts; papers on federated MoE use it as a bound.
    theta <- sum_i p_i theta_i over LoRA factors and all experts' weights E_{l,e}, p_i = n_i / n.
    Trained: attention LoRA and all routed experts, in place. Sent: all of it, every round, in both directions.
    Aggregated: mean by rows. Stays: nothing. Frozen: routers, shared experts, embeddings, attention matrices.
    Inference: the global experts and LoRA.
    Open choices: the routers stay frozen, so that the averaged experts keep the tokens they were trained for. An
    expert that a client's tokens never reach is sent unchanged and pulls the mean to the old value. Attention
    trains by LoRA, not with all its weights. Whole experts train with the rate ``expert_lr``, by default a tenth of
    LoRA's; with a number as ``rank``, experts have LoRA and train with LoRA's rate. With ``rank = "full"`` every
    client holds an fp32 copy of all experts, their gradients and two moments: four times the experts' fp32 size on
    a client, one time on the wire.
    """

    name = "moe_fedavg"
    summary = "attention LoRA and all routed experts averaged; nothing personal"
    source = "McMahan et al., AISTATS 2017, on a whole MoE"
    sends = "attention LoRA and all routed experts"
    needs_experts = True

    class Options(Method.Options):
        """How experts train, and their learning rate."""

        rank: Annotated[int, Field(ge=1)] | Literal["full"] = "full"
        """LoRA rank of every routed expert, at scaling lora.alpha / rank, or "full" for all of its weights."""
        expert_lr: float | None = Field(None, gt=0)
        """Peak learning rate of the experts; default training.lr / 10 for whole experts, training.lr for LoRA."""

    options: Options

    def parts(self, site: Site) -> dict[str, Part]:
        """Return the adaptation of every expert of every layer."""
        every = {e.name: range(e.num_experts) for e in site.experts}
        stream, lora = site.common_generator("experts"), site.config.lora
        experts = ExpertAdapters(site.experts, every, self.options.rank, lora.alpha, stream, dropout=lora.dropout)
        return {"experts": experts}

    def shared(self, names: Collection[str]) -> set[str]:
        """Return all trained parameters: everything is shared."""
        return set(names)

    def train(self, turn: Turn) -> TrainResult:
        """Train LoRA and experts together, each with its learning rate."""
        lr = turn.settings.training.lr
        usual = lr / 10 if self.options.rank == "full" else lr
        own = {"experts.*": self.options.expert_lr or usual}
        return turn.fit(settings=replace(turn.settings, own_lr=own))
