"""Placement of a base's weights: on the computing device, and routed experts elsewhere if they do not fit.

Attention has LoRA, and all other weights are small, so only experts are offloaded to the CPU's memory or to disk;
accelerate copies a layer's experts to the device during its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn

from flexperts.config.model import ModelConfig
from flexperts.errors import ModelError, did_you_mean
from flexperts.modeling.memory import free_bytes
from flexperts.modeling.skeleton import skeleton
from flexperts.moe.experts import find_experts
from flexperts.moe.fused import FusedExperts
from flexperts.moe.layout import LayerExperts
from flexperts.parameters.fingerprint import stored_bytes

_SHARE = 0.7
"""Share of the free memory that is used if the recipe has no limit; training needs the rest."""
_Place = Callable[[LayerExperts], str]


def computing_device(name: str) -> torch.device:
    """Return the device that a recipe's ``model.device`` names."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model.device = {name!r}", f"torch cannot use it ({reason})", "use auto or cpu"
        ) from error


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
    holders = sorted({name.rpartition(".")[0] for name in model.state_dict()})
    return {name: next((places[up] for up in _upwards(name) if up in places), str(device)) for name in holders}


def _mapped(wanted: dict[str, Any], model: nn.Module, device: torch.device) -> _Place:
    """Place a layer's experts as the recipe says for them or for the nearest module that contains them."""
    names = dict(model.named_modules())
    if unknown := sorted(wanted.keys() - names.keys()):
        hint = did_you_mean(unknown[0], names, "use module names as `flexperts inspect` shows them")
        raise ModelError(f"model.device_map names {unknown[0]!r}", "the base has no such module", hint)
    return lambda experts: _beside(
        experts, next((wanted[up] for up in _upwards(experts.name) if up in wanted), str(device)), device
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


def _upwards(name: str) -> Iterator[str]:
    """Yield the names of a module and of the modules that contain it, up to the model, ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
