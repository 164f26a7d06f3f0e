"""FLOPs of one token's forward pass, counted from shapes.

A matrix of n values costs 2 n FLOPs per token (multiply and add). Counted: attention projections, dense and shared
MLPs, K of the N routed experts, router, vocabulary projection, adapters, grafts. Not counted: attention over the
context, which grows with its length, norms, activations, and the input embedding, which is a look-up.
Shapes: N routed experts, K of them per token.
"""

from __future__ import annotations

from torch import nn

from flexperts.client.model import ClientModel
from flexperts.moe.experts import find_experts
from flexperts.moe.layout import LayerExperts
from flexperts.parts.expert_adapters import AdaptedLayer, ExpertAdapters
from flexperts.parts.grafts import Graft, Grafts
from flexperts.parts.part import Part
from flexperts.parts.personal_expert import LowRankExpert
from flexperts.parts.router_deltas import RouterDeltas


def base_flops(model: nn.Module, top_k: int) -> float:
    """Return a base's FLOPs per token; ``top_k`` is K."""
    experts = find_experts(model)
    routed = {id(p) for e in experts for p in e.stored}
    values = float(sum(top_k * _expert(e) for e in experts))
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            dense = (p for p in module.parameters(recurse=False) if id(p) not in routed)
            values += sum(p.numel() for p in dense if p.dim() == 2)
    return 2 * values


def added_flops(model: ClientModel, parts: dict[str, Part], top_k: int) -> float:
    """Return the FLOPs per token that a method's adapters and parts add to the base's.

    Tokens are assumed to use all experts equally. A personal LoRA counts as used in addition to the shared one.

    Args:
        model: The model with its adapters.
        parts: The parts that the method attaches to the model.
        top_k: ``K``.
    """
    if model.method.states == ("zero_shot",):
        return 0.0  # this method disables the adapters
    lora = sum(p.numel() for p in model.lora.parameters().values())
    return 2 * (lora + sum(_part(part, top_k) for part in parts.values()))


def _part(part: Part, top_k: int) -> float:
    """Return the matrix values of a part that a token is multiplied with."""
    if isinstance(part, Grafts):
        return sum(_graft(graft) for graft in part)
    if isinstance(part, ExpertAdapters):
        return sum(_adapted(layer, top_k, restrict=part.restrict) for layer in part)
    if isinstance(part, RouterDeltas):
        return 0.0  # added to the router's matrix once per forward pass
    return _matrices(part)


def _graft(graft: Graft) -> float:
    computed = sum(graft.difference + isinstance(expert, LowRankExpert) for expert in graft.personal)
    return _matrices(graft) + computed * _expert(graft.experts)  # frozen experts


def _adapted(layer: AdaptedLayer, top_k: int, *, restrict: bool) -> float:
    """Return the added cost of adapted experts, minus the base's experts where adapted ones replace all of them."""
    share, whole = top_k / layer.experts.num_experts, _expert(layer.experts)
    frozen = sum(whole for expert in layer.values() if isinstance(expert, LowRankExpert))
    saved = top_k * whole if restrict or layer.is_whole else 0.0
    return share * (_matrices(layer) + frozen) - saved


def _expert(experts: LayerExperts) -> int:
    """Return the matrix values of one routed expert."""
    return sum(t.numel() for _, t in experts.expert(0).items() if t.dim() == 2)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
