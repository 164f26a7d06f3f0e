"""One client on several cards: a base whose layers are divided over processes by FSDP2, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError, ModelError
from flexperts.modeling.placement import layer_names, offloaded
from flexperts.moe.quantized import QuantizedTensor
from flexperts.moe.stored import execution_device

_PARALLEL = {"tp_size": "tensor", "ep_size": "expert", "pp_size": "pipeline"}
_REMEDY = "use one card, or divide the layers with FSDP2 as in docs/large-models.md"


def shard_layers(base: nn.Module, device: torch.device) -> None:
    """Divide the layers of a base over the N processes of the default process group, by FSDP2.

    Each process keeps 1/N of every layer's weights on its device, and FSDP2 gathers a layer when it computes. Other
    weights, such as embeddings, are whole on every device, and so is what is trained. Reading an expert gathers its
    layer's experts, so all processes must make the same calls in the same order.

    Args:
        base: The frozen model, whole, in the CPU's memory, without adapters.
        device: The device of this process.

    Raises:
        ModelError: The model has no experts, or weights that are quantized or offloaded.
    """
    layers = layer_names(base)
    if any(p.is_meta or isinstance(p, QuantizedTensor) for p in base.parameters()):
        raise ModelError(
            "a base with weights that are quantized or offloaded",
            "FSDP2 divides only weights that are in memory and not quantized",
            "leave out model.quantization and model.device_map",
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(base.get_submodule(layer), mesh=mesh)
    base.to(device)


def check_undivided(workers: int) -> None:
    """Refuse worker processes where a base may be divided over processes: each of them would load it whole.

    Raises:
        ConfigError: This process is one of several.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"engine.workers = {workers} in one of {dist.get_world_size()} processes",
            "each of them would start workers with a whole base",
            "set engine.workers = 1",
        )


def check_cards(base: Any, config: RunConfig) -> None:
    """Refuse a base on several devices that a client cannot train on.

    Args:
        base: The model.
        config: The run.

    Raises:
        ModelError: The weights are on several devices without model.device_map, or are divided by tensor, expert or
            pipeline parallelism.
        ConfigError: The run adds noise, and the base is divided over processes; or experts are offloaded from a
            card without gradient checkpointing.
    """
    divided = getattr(base.config, "distributed_config", None)
    if kinds := [kind for size, kind in _PARALLEL.items() if (getattr(divided, size, None) or 1) > 1]:
        raise ModelError(
            f"a base with {' and '.join(kinds)} parallelism",
            "LoRA, grafts and the selection need each layer's whole weights where the layer computes",
            _REMEDY,
        )
    devices = sorted({str(p.device) for p in base.parameters() if not p.is_meta})
    if len(devices) > 1 and not hasattr(base, "hf_device_map"):
        raise ModelError(f"a base on {', '.join(devices)}", "a client computes on one device", _REMEDY)
    if (kept := offloaded(base)) and not config.training.gradient_checkpointing:
        raise ConfigError(
            "training.gradient_checkpointing = false with model.device_map",
            f"autograd would keep the copies of all offloaded experts on {execution_device(kept[0])} until the "
            "backward pass, so offloading would save nothing",
            "set training.gradient_checkpointing = true",
        )
    if config.privacy.noise != "none" and any(isinstance(p, DTensor) for p in base.parameters()):
        raise ConfigError(
            f"privacy.noise = {config.privacy.noise!r} with a base that is divided over processes",
            "every process would draw other noise, and they must compute the same",
            "use privacy.noise = 'none', or a base on one card",
        )
