"""The same bits twice on a CUDA device, as far as its operations can."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FILL: Any = torch.utils.deterministic  # its attribute is a property of the module, which type checkers do not know


def prepare_repeatable(device: torch.device) -> None:
    """Give cuBLAS fixed workspaces, which it asks for once, before its first product on the device."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms on a CUDA device inside the block; a CPU's operations are deterministic anyway.

    Operations that have none warn and run; docs/reliability.md lists them. What the caller has set stays: a
    program that forbids such operations gets torch's error.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    fills, searches = _FILL.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    _FILL.fill_uninitialized_memory = False  # one more kernel per new tensor, and none is read before a write
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        _FILL.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = searches
