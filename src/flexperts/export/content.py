"""What a client's model in one state has beyond the base, and how it is merged into the base.

Everything is read from adapters and parts, not from the method's name. A part that a folder of weights cannot
contain is refused by its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexperts.client.client import Client
from flexperts.client.request import Request
from flexperts.errors import ConfigError
from flexperts.methods.kit.method import State
from flexperts.methods.kit.ranks import Factors, stacked
from flexperts.modeling.lora import SHARED_PREFIX, LoraAdapters
from flexperts.moe.fused import FusedExperts
from flexperts.moe.layout import LayerExperts
from flexperts.moe.router import find_router
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.grafts import Graft, Grafts
from flexperts.parts.part import Part, key
from flexperts.parts.personal_expert import LowRankExpert
from flexperts.parts.router_deltas import RouterDeltas
from flexperts.parts.stacked_lora import StackedLora

_WEIGHTS = (Grafts, ExpertAdapters, RouterDeltas, StackedLora)
"""The parts that only change weights of the base or add grafts."""


@dataclass(frozen=True)
class Content:
    """What a model has beyond the base.

    Args:
        lora: All adapters in use combined into one, fp32 copies.
        scale: Factor of B A.
        grafts: Grafts by the part's name.
        experts: Experts adapted in place.
        routers: Experts modules, each with the delta of its router.
        logits: This model's logits on the reference tokens.
    """

    lora: Factors
    scale: float
    grafts: dict[str, Grafts]
    experts: list[ExpertAdapters]
    routers: list[tuple[LayerExperts, Tensor]]
    logits: Tensor

    @property
    def is_lora_alone(self) -> bool:
        """Whether LoRA is all it has, so that an adapter folder is enough."""
        return not (self.grafts or self.experts or self.routers)

    def adapter(self) -> dict[str, Tensor]:
        """Return LoRA's factors under their names in PEFT's files."""
        start = f"{SHARED_PREFIX}model."
        return {
            f"{start}{target}.lora_{side}.weight": factor
            for target, factors in self.lora.items()
            for side, factor in zip("AB", factors, strict=True)
        }

    @torch.no_grad()
    def merge(self, base: Any) -> None:
        """Add LoRA, adapted experts and router deltas to the weights of the base, each rounded once."""
        for target, (A, B) in self.lora.items():
            weight = base.get_submodule(target).weight
            weight.copy_(weight.float() + self.scale * (B @ A).to(weight.device))
        for layer in (layer for part in self.experts for layer in part):
            for index in layer.indices:
                stored = dict(layer.experts.expert(index).items())
                for name, tensor in whole_expert(layer[str(index)]).items():
                    stored[name].copy_(tensor)
        for experts, delta in self.routers:
            weight = find_router(base, experts).weight
            weight.copy_(weight.float() + delta)


class Exported(Client):
    """A client whose model is exported."""

    def content(self, request: Request, state: State, tokens: Tensor) -> Content:
        """Return what the client's model has beyond the base in a state.

        Args:
            request: The finished global model.
            state: global, personalized or chosen.
            tokens: Token ids ``[B, S]`` for ``Content.logits``.
        """
        with self.turn_in(request, state) as (turn, on_batch):
            site, enabled = turn.site, {name: part for name, part in turn.parts.items() if part.enabled}
            parts = enabled.values()
            if reason := "; ".join(filter(None, map(unfit, parts))):
                raise self._refused(state, reason)
            lora = _lora(site.lora, [part for part in parts if isinstance(part, StackedLora)])
            if on_batch is not None or lora is None:
                raise self._refused(state, "its weights change with every input")
            routers = [part.layers for part in parts if isinstance(part, RouterDeltas)]
            return Content(
                lora=lora,
                scale=site.lora.scale,
                grafts={name: part for name, part in enabled.items() if isinstance(part, Grafts)},
                experts=[part for part in parts if isinstance(part, ExpertAdapters)],
                routers=[(experts, layers[key(experts.name)]) for layers in routers for experts in site.experts],
                logits=logits_of(turn.model, tokens),
            )

    def _refused(self, state: State, reason: str) -> ConfigError:
        others = [s for s in self.method.states if s not in ("zero_shot", state)]
        other = f"export --state {others[0]}, or " if others else ""
        return ConfigError(
            f"{self.method.name} in state {state}",
            reason,
            f"{other}use the model in the run with `flexperts generate`",
        )


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Return a model's logits ``[B, S, V]`` in fp32 on the CPU."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits.float().cpu()


@torch.no_grad()
def whole_expert(expert: Any) -> Mapping[str, Tensor]:
    """Return a personal expert's tensors in the base's layout; low-rank deltas are added to the weights in fp32."""
    if not isinstance(expert, LowRankExpert):
        return dict(expert.named_parameters())
    tensors = {name: tensor.float() for name, tensor in expert.frozen.items()}
    for name, A, B in (
        ("up", expert.up_lora_A, expert.up_lora_B),
        ("down", expert.down_lora_A, expert.down_lora_B),
    ):
        delta = expert.scale * (B @ A)
        tensors[name] = tensors[name] + (delta.T if expert.experts.is_transposed else delta)
    return tensors


def graft_tensors(graft: Graft) -> dict[str, Tensor]:
    """Return a layer's grafts by their names in the exported code, with personal experts stacked ``[k, ...]``."""
    each = [whole_expert(expert) for expert in graft.personal]
    stacked = {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}
    return stacked | {"gate_weight": graft.graft_gate_weight.detach(), "gate_bias": graft.graft_gate_bias.detach()}


def unfit(part: Part) -> str:
    """Return why a folder of weights cannot contain a part, or an empty text if it can."""
    if not isinstance(part, _WEIGHTS):
        return f"a transformers model cannot contain {type(part).__name__}"
    if isinstance(part, ExpertAdapters) and part.restrict:
        return "the model leaves out experts that the router chooses, which a transformers model cannot do"
    layers = part if isinstance(part, Grafts | ExpertAdapters) else ()
    odd = [layer.experts for layer in layers if not isinstance(layer.experts, FusedExperts)]
    return f"{type(odd[0].module).__name__} does not store its experts as fused tensors" if odd else ""


def _lora(lora: LoraAdapters, stacks: Sequence[StackedLora]) -> Factors | None:
    """Return one pair of factors per layer that combines all adapters and stacks in use.

    Return None where their effect is not a pair of factors.
    """
    used = lora.in_use()
    if used is None:
        return None
    if not all(used.values()):
        return {}
    adapters: list[Factors] = [
        {target: (A, B / lora.scale) for target, (A, B) in zip(used, pairs, strict=True)}
        for pairs in zip(*used.values(), strict=True)
    ]
    layers: Any = [part.layers for part in stacks]
    adapters += [{target: (layer[key(target)].A, layer[key(target)].B) for target in used} for layer in layers]
    # Adapters that add nothing are left out, such as the new adapter of a stacking method.
    adding = [adapter for adapter in adapters if any(B.any() for _, B in adapter.values())] or adapters[:1]
    together = stacked([(1, adapter) for adapter in adding])
    return {target: (A.float().cpu(), B.float().cpu()) for target, (A, B) in together.items()}
