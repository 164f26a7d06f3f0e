"""What a model of a finished run adds to the base, read from the model as evaluation sets it up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexperts.client.states import in_states
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.turn import Turn
from flexperts.parts.grafts import Graft, Grafts
from flexperts.parts.part import Part
from flexperts.parts.personal_expert import FullExpert
from flexperts.serving.contract import ModelName

FactorPairs = list[tuple[Tensor, Tensor]]
"""Low-rank terms of one layer: A ``[r, in]``, B ``[out, r]`` multiplied by its scale."""


@dataclass(frozen=True)
class Additions:
    """What one model adds to the base; models that add the same values have the same keys.

    Args:
        lora: Attention layer -> low-rank terms; empty where the model has none.
        lora_key: Digest of the values of ``lora``; None where there are none.
        grafts: Experts module -> the grafts on it.
        graft_key: Digest of the values of ``grafts``; None where there are none.
    """

    lora: Mapping[str, FactorPairs] = field(default_factory=dict)
    lora_key: str | None = None
    grafts: Mapping[str, list[Graft]] = field(default_factory=dict)
    graft_key: str | None = None


def all_models(trained: TrainedRun) -> tuple[ModelName, ...]:
    """Return every client in every state of the run, its own state last."""
    states = trained.states
    return tuple(ModelName(client, state, "chosen" in states) for client in trained.clients for state in states)


def additions(trained: TrainedRun, name: ModelName) -> Additions | None:
    """Return what a model adds to the base; None if it is more than LoRA and grafts.

    Args:
        trained: The run.
        name: The model.
    """
    return all_additions(trained, [name])[name]


def all_additions(trained: TrainedRun, names: Sequence[ModelName]) -> dict[ModelName, Additions | None]:
    """Return what each of one client's models adds, from one load of its state where its states allow it."""
    found: dict[ModelName, Additions | None] = {name: Additions() for name in names}
    # The unchanged base, for any method, needs no state.
    if personal := [name for name in names if name.state != "zero_shot"]:
        client = trained.client(personal[0].client)
        with in_states(client, trained.request(client.name)) as enter:
            for name in personal:
                with enter(name.state) as (turn, on_batch):
                    found[name] = None if on_batch else _added(turn)
    return found


def _added(turn: Turn) -> Additions | None:
    parts = [part for part in turn.parts.values() if part.enabled]
    lora = turn.site.lora.in_use()
    if lora is None or not all(isinstance(part, Grafts) for part in parts):
        return None
    lora = {target: factors for target, factors in lora.items() if factors}
    grafts = _by_layer(parts)
    return Additions(lora, _key(_tensors(lora)), grafts, _key(_graft_tensors(grafts)))


def _by_layer(parts: Iterable[Part]) -> dict[str, list[Graft]]:
    """Return all grafts by experts module, with whole experts in the base's dtype.

    A forward pass casts them to that dtype anyway, so answers stay the same and a client needs half the memory.
    """
    layers: dict[str, list[Graft]] = {}
    for part in parts:
        for graft in part if isinstance(part, Grafts) else ():
            for expert in graft.personal:
                if isinstance(expert, FullExpert):
                    expert.to(graft.experts.dtype)
            layers.setdefault(graft.experts.name, []).append(graft.requires_grad_(False))
    return layers


def _tensors(lora: Mapping[str, FactorPairs]) -> list[Tensor]:
    return [tensor for factors in lora.values() for pair in factors for tensor in pair]


def _graft_tensors(grafts: Mapping[str, list[Graft]]) -> list[Tensor]:
    """Return what distinguishes grafts: parameters, scales, first experts, and whether these are subtracted."""
    modules: list[Graft] = [graft for layer in grafts.values() for graft in layer]
    constants = [torch.tensor([*graft.indices, *graft.scales, graft.difference]) for graft in modules]
    return constants + [parameter for graft in modules for parameter in graft.parameters()]


def _key(tensors: Iterable[Tensor]) -> str | None:
    """Return a digest of the tensors' values; None if there are no tensors."""
    digest, empty = hashlib.sha256(), True
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        empty = False
    return None if empty else digest.hexdigest()
