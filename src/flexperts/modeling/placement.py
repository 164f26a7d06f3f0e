"""Placement of a base's weights: on the computing device, and routed experts elsewhere if they do not fit.

Attention has LoRA, and all other weights are small, so only experts are offloaded to the CPU's memory or to disk;
accelerate copies a layer's experts to the device during its forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int, has_offloaded_params
from torch import nn

from flexperts.config.model import ModelConfig
from flexperts.environment import DEVICE
from flexperts.errors import ModelError, did_you_mean
from flexperts.modeling.memory import free_bytes
from flexperts.modeling.repeatable import prepare_repeatable
from flexperts.modeling.skeleton import skeleton
from flexperts.moe.experts import find_experts
from flexperts.moe.fused import FusedExperts
from flexperts.moe.layout import LayerExperts
from flexperts.moe.stored import execution_device
from flexperts.parameters.fingerprint import stored_bytes

_SHARE = 0.7
"""Share of the free memory that is used if the recipe has no limit; training needs the rest."""
_Place = Callable[[LayerExperts], str]


def computing_device(name: str, of: str = "device") -> torch.device:
    """Return the device on which this process computes: what ``--device`` or its variable says, else ``name``.

    Args:
        name: What a silo's file or a recipe says; auto is CUDA where there is a card.
        of: The name of the setting.
    """
    asked = os.environ.get(DEVICE) or name if of == "device" else name
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    try:
        device = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{of} {asked!r}", f"torch cannot use it ({reason})", "use auto or cpu") from error
    prepare_repeatable(device)
    return device


def placement(config: ModelConfig, base: Any, device: torch.device) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for placement; every tensor is loaded directly to its place.

    Args:
        config: The recipe's model section.
        base: The base's transformers configuration.
        device: The computing device.
    """
    if config.device_map is None:
        return {"device_map": {"": str(device)}}
    model = skeleton(base, config.dtype, trust_remote_code=config.trust_remote_code)
    if isinstance(config.device_map, dict) and {"cpu", "disk"}.isdisjoint(config.device_map.values()):
        return {"device_map": _on_cards(config.device_map, model, device)}
    if config.device_map == "auto":
        place = _automatic(config, model, device)
    else:
        place = _mapped(config.device_map, model, device)
    if config.offload_folder is not None:
        Path(config.offload_folder).mkdir(parents=True, exist_ok=True)
    return {"device_map": _spread(model, place, device), "offload_folder": config.offload_folder}


def _spread(model: nn.Module, place: _Place, device: torch.device) -> dict[str, str]:
    """Return the place of every module that has tensors directly."""
    places = {e.name: place(e) for e in find_experts(model)}
    return {
        name: next((places[up] for up in upwards(name) if up in places), str(device)) for name in _holders(model)
    }


def _holders(model: nn.Module) -> list[str]:
    """Return the names of the modules that have tensors directly."""
    return sorted({name.rpartition(".")[0] for name in model.state_dict()})


def pin_offloaded(model: nn.Module) -> None:
    """Move experts in the CPU's memory to pages that stay there, so that a card fetches them directly."""
    stored = {id(m._hf_hook.weights_map.dataset): m._hf_hook.weights_map.dataset for m in offloaded(model)}
    for weights in stored.values():
        kept = weights.state_dict
        kept.update({name: values.pin_memory() for name, values in kept.items() if not values.is_meta})


def start_on(model: Any, device: torch.device) -> None:
    """Let a model whose layers are on several cards take its inputs on the computing device.

    accelerate draws one of the cards from a set, which differs from process to process.
    """
    if len({str(place) for place in getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}) > 1:
        model._hf_hook.execution_device = str(device)


def offloaded(model: nn.Module) -> list[Any]:
    """Return the modules whose weights accelerate brings to a card for each forward pass."""
    return [m for m in model.modules() if has_offloaded_params(m) and execution_device(m).type != "cpu"]


@contextmanager
def offloaded_left_there(model: nn.Module) -> Iterator[None]:
    """Keep other libraries from bringing offloaded weights to the card inside the block, in which nothing computes.

    PEFT brings all of them at once when it removes its layers, also where none of those is offloaded.
    """
    hooks = [module._hf_hook for module in offloaded(model)]
    for hook in hooks:
        hook.offload = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.offload = True


def _on_cards(wanted: dict[str, str], model: nn.Module, device: torch.device) -> dict[str, str]:
    """Return the place of every layer, and of every other module that has tensors directly.

    A layer's inputs are moved to its card by accelerate. Other modules stay on the computing device.
    """
    _check_modules(wanted, model)
    layers = layer_names(model)
    if inside := [name for name in wanted if any(name.startswith(f"{layer}.") for layer in layers)]:
        rule = "a card takes whole layers, because a layer adds its parts' outputs up"
        raise ModelError(f"model.device_map names {inside[0]!r}", rule, f"name a layer, such as {layers[0]!r}")
    for place in set(wanted.values()):
        computing_device(place, of="model.device_map")
    others = {name for name in _holders(model) if not name.startswith(tuple(f"{layer}." for layer in layers))}
    places = {name: next((wanted[up] for up in upwards(name) if up in wanted), str(device)) for name in layers}
    return dict.fromkeys(sorted(others), str(device)) | places


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of a model's layers: the modules of the list that contains its experts."""
    name = find_experts(model)[0].name
    outer = (name[:end] for end, letter in enumerate(name) if letter == ".")
    stack = next(above for above in outer if isinstance(model.get_submodule(above), nn.ModuleList))
    return [f"{stack}.{number}" for number, _ in model.get_submodule(stack).named_children()]


def _check_modules(wanted: dict[str, Any], model: nn.Module) -> None:
    names = dict(model.named_modules())
    if unknown := sorted(wanted.keys() - names.keys()):
        hint = did_you_mean(unknown[0], names, "use module names as `flexperts inspect` shows them")
        raise ModelError(f"model.device_map names {unknown[0]!r}", "the base has no such module", hint)


def _mapped(wanted: dict[str, Any], model: nn.Module, device: torch.device) -> _Place:
    """Place a layer's experts as the recipe says for them or for the nearest module that contains them."""
    _check_modules(wanted, model)
    return lambda experts: _beside(
        experts, next((wanted[up] for up in upwards(experts.name) if up in wanted), str(device)), device
    )


def _automatic(config: ModelConfig, model: nn.Module, device: torch.device) -> _Place:
    """Fill the device with all other weights, then with experts layer by layer; then the CPU, then the disk."""
    stored = {e.name: sum(map(stored_bytes, e.stored)) for e in find_experts(model)}
    fixed = sum(map(stored_bytes, model.parameters())) - sum(stored.values())
    left = {str(device): _limit(config, "device", device) - fixed}
    if device.type != "cpu":
        left["cpu"] = _limit(config, "cpu", torch.device("cpu"))

    def place(experts: LayerExperts) -> str:
        size = stored[experts.name]
        first = next((where for where, room in left.items() if room >= size), "disk")
        if first in left:
            left[first] -= size
        return _beside(experts, first, device)

    return place


def _beside(experts: LayerExperts, place: str, device: torch.device) -> str:
    if place != str(device) and not isinstance(experts, FusedExperts):
        raise ModelError(
            f"model.device_map puts {experts.name} on {place}",
            "only fused experts can be read one by one from there, and these are not fused",
            "leave these experts on the computing device",
        )
    return place


def _limit(config: ModelConfig, place: Any, device: torch.device) -> int:
    if (given := config.max_memory.get(place)) is None:
        return int(_SHARE * free_bytes(device))
    try:
        return int(given) if given.isdigit() else int(convert_file_size_to_int(given))
    except ValueError as error:
        raise ModelError(
            f"model.max_memory.{place} = {given!r}", "it must be a size", "write it in a form such as '8GiB'"
        ) from error


def upwards(name: str) -> Iterator[str]:
    """Yield the names of a module and of the modules that contain it, up to the model, ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
