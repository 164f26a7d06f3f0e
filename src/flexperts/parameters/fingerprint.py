"""The fingerprint of a base model's weights, fast for 30 billion of them, and the tensors that store a weight."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_SAMPLES = 1024


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over every parameter's name, shape, type and up to 1,024 evenly spaced values.

    Two checkpoints of one architecture differ in nearly all values, so a sample distinguishes them; hashing all
    bytes of a large base would take minutes at every start. The fingerprint identifies a base; it does not protect
    against tampering. A quantized weight is hashed by its codes and scales, so a quantized base has another
    fingerprint. Neither offloading nor FSDP2 changes it.
    """
    digest = hashlib.sha256()
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # after offloading they are not the same tensor
    for name, parameter in sorted(model.named_parameters()):
        if name in tied:
            continue
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        for values in stored_tensors(model, name, parameter):
            flat = values.detach().reshape(-1)
            step = max(1, -(-flat.numel() // _SAMPLES))
            sample = flat[::step].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_tensors(model: nn.Module, name: str, parameter: Any) -> list[Tensor]:
    """Return the tensors that store a parameter's values, also if it is offloaded or divided over processes."""
    path, _, own = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if has_offloaded_params(module):
        return [module._hf_hook.weights_map[own]]
    return [parameter.full_tensor()] if isinstance(parameter, DTensor) else inner_tensors(parameter)


def inner_tensors(tensor: Any) -> list[Tensor]:
    """Return the tensors that store a parameter's values in this process, such as a quantized weight's codes."""
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [value for value in inner if isinstance(value, Tensor)]
    return [tensor]


def stored_bytes(tensor: Any) -> int:
    """Return the bytes in which a tensor's values are stored."""
    return sum(inner.numel() * inner.element_size() for inner in inner_tensors(tensor))
