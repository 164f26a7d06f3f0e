"""The ordinary tensors that a parameter is made of: itself, or what a tensor subclass holds in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def inner_tensors(tensor: Any) -> list[Tensor]:
    """Return the tensors that hold a parameter's values, such as a quantized weight's codes and scales."""
    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor]


def stored_bytes(tensor: Any) -> int:
    """Return the bytes that a tensor's values take where it is stored."""
    return sum(inner.numel() * inner.element_size() for inner in inner_tensors(tensor))
