"""Search for NaN and infinity in a model's weights: a NaN shows only when a token is routed to its expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flexperts.parameters.fingerprint import stored_tensors

_NARROWEST = 2
"""Smallest floating type that is checked, in bytes; smaller types are codes, for which torch has no min and max."""


def first_not_finite(model: nn.Module) -> str | None:
    """Return the name, with its expert, of the first parameter with NaN or infinity or buffer with NaN, else None.

    Every value is read once (``benchmarks/small_costs.py``). Buffers may contain infinity.
    """
    for name, tensor, may_be_infinite in _tensors(model):
        if not tensor.is_floating_point() or tensor.element_size() < _NARROWEST or not tensor.numel():
            continue
        ends = torch.stack(torch.aminmax(tensor.detach()))  # NaN if any value is NaN
        if bool(ends.isnan().any()) or not (may_be_infinite or ends.isfinite().all()):
            return f"{name}{_place(tensor)}"
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in model.named_parameters():
        yield from ((name, values, False) for values in stored_tensors(model, name, parameter))
    yield from ((name, buffer, True) for name, buffer in model.named_buffers() if not buffer.is_meta)


def _place(tensor: Any) -> str:
    """Return the expert's number in brackets, if one tensor stores all experts of a layer."""
    if tensor.dim() < 3:
        return ""
    broken = (bool(expert.isfinite().all()) for expert in tensor)
    return f"[{next(number for number, fine in enumerate(broken) if not fine)}]"
