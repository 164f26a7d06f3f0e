"""Reading frozen weights wherever they lie: in memory, as codes, or offloaded between forward passes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from flexperts.moe.quantized import QuantizedTensor


def read(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of ``module`` detached, or None where it has none of that name.

    What accelerate has offloaded is read where it lies, in a file or in the CPU's memory: of a file's tensor only
    what is used is loaded. The module itself stays as it is.
    """
    parameter = getattr(module, name, None)
    if parameter is None:
        return None
    if has_offloaded_params(module):
        offloaded: Any = module._hf_hook
        return torch.as_tensor(offloaded.weights_map[name])
    return parameter.detach()  # type: ignore[no-any-return]


def read_part(module: nn.Module, name: str, index: int | slice) -> Tensor | None:
    """Return ``parameter[index]`` where the module computes: a view in memory, or a copy of that part alone."""
    whole = read(module, name)
    if whole is None:
        return None
    part = whole[index].to(computing_device(module)) if has_offloaded_params(module) else whole[index]
    return part.dequantize() if isinstance(part, QuantizedTensor) else part


def lies_whole(module: nn.Module) -> bool:
    """Tell whether a module's weights can all be read at once without a copy: neither codes nor offloaded."""
    return not has_offloaded_params(module) and not any(isinstance(p, QuantizedTensor) for p in module.parameters())


def computing_device(module: nn.Module) -> torch.device:
    """Return where a module that holds parameters computes."""
    if has_offloaded_params(module):
        hook: Any = module._hf_hook
        return torch.device(hook.execution_device)
    return next(module.parameters(recurse=False)).device
