"""Reading of frozen weights: in memory, quantized, offloaded between forward passes, or divided over processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexperts.moe.quantized import QuantizedTensor


def read(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of ``module``, detached, or None if there is none with this name.

    A parameter that accelerate has offloaded is read from its file or from the CPU's memory; of a tensor in a file,
    only the used part is loaded. A parameter that FSDP2 has divided is gathered from all processes, which must all
    call this. The module is not changed.
    """
    parameter = getattr(module, name, None)
    if parameter is None:
        return None
    if has_offloaded_params(module):
        offloaded: Any = module._hf_hook
        return torch.as_tensor(offloaded.weights_map[name])
    values: Tensor = parameter.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values


def read_part(module: nn.Module, name: str, index: int | slice) -> Tensor | None:
    """Return ``parameter[index]`` on the module's computing device: a view in memory, or a copy of this part."""
    whole = read(module, name)
    if whole is None:
        return None
    part = whole[index].to(execution_device(module)) if has_offloaded_params(module) else whole[index]
    return part.dequantize() if isinstance(part, QuantizedTensor) else part


def lies_whole(module: nn.Module) -> bool:
    """Return whether all weights of a module can be read without a copy: not quantized and not offloaded."""
    return not has_offloaded_params(module) and not any(isinstance(p, QuantizedTensor) for p in module.parameters())


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module with parameters computes."""
    if has_offloaded_params(module):
        hook: Any = module._hf_hook
        return torch.device(hook.execution_device)
    return next(module.parameters(recurse=False)).device
