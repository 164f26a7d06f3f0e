"""FLEx: selective aggregation, expert grafting, adaptive gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from flexperts.grafting.grafts import Grafts
from flexperts.grafting.part import Part
from flexperts.grafting.rules import coefficients, pick_layers, select
from flexperts.grafting.selection import LayerScores
from flexperts.methods.base import Method, State
from flexperts.methods.turn import Prepared, Site


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
    keeps = "grafted experts and their gate"
    needs_experts = True
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")

    def prepare(self, site: Site) -> Prepared:
        """Select the experts to graft on the client's own rows, by the rule that the recipe names."""
        graft, stream = site.config.graft, site.generator("selection")
        layers = pick_layers(site.score_experts(), graft.layers)
        choice = {s.name: select(graft.selection, s, graft.experts, stream) for s in layers}
        return Prepared(choice, {s.name: s.relative.tolist() for s in layers}, _scales(graft.scale, layers, choice))

    def parts(self, site: Site) -> dict[str, Part]:
        """Graft the chosen experts."""
        graft = site.config.graft
        grafts = Grafts(
            site.experts,
            site.prepared.choice,
            rank=graft.rank,
            alpha=graft.alpha,
            gate_bias=graft.gate_bias,
            scales=site.prepared.scales or None,
            generator=site.generator("graft"),
        )
        return {"graft": grafts}


def _scales(
    scale: float | Literal["least_squares"], layers: Sequence[LayerScores], choice: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[float, ...]]:
    """Return every chosen expert's factor; none where all are 1."""
    if scale == "least_squares":
        return {layer.name: coefficients(layer, choice[layer.name]) for layer in layers}
    return {} if scale == 1 else {name: (scale,) * len(indices) for name, indices in choice.items()}
