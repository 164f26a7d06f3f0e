"""Flat experts: three matrices ``[N * I, D]`` in a module below the experts module, with separate gate and up.

The module is called like fused experts, but with hidden states ``[B, S, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from flexperts.moe.layout import ExpertWeights, LayerExperts, num_arguments, own_parameters
from flexperts.moe.stored import execution_device, read

_NAMES = {"w1", "v1", "w2"}
"""Gate, up and down: y = (act(x w1') * (x v1')) w2."""


@dataclass(frozen=True)
class FlatExperts(LayerExperts):
    """Experts stored as slices of rows."""

    @classmethod
    def recognise(cls, name: str, module: nn.Module, parent: nn.Module) -> Self | None:
        """Recognise the three matrices one level below a module that is called with (x, index, weights)."""
        count, below = getattr(module, "num_experts", None), getattr(module, "mlp", None)
        if not isinstance(count, int) or not isinstance(below, nn.Module) or num_arguments(module) != 3:
            return None
        own = own_parameters(below)
        fits = own.keys() == _NAMES and all(p.dim() == 2 and p.shape[0] % count == 0 for p in own.values())
        return cls(name, module) if fits else None

    def expert(self, index: int) -> ExpertWeights:
        """Return expert ``index``: the down projection as a view, gate and up joined in a copy."""
        gate, up, down = (self._slice(name, index) for name in ("w1", "v1", "w2"))
        return ExpertWeights(torch.cat([gate, up]), down.T)

    def _slice(self, name: str, index: int) -> Tensor:
        """Return one expert's rows of a matrix, ``[I, D]``."""
        below = cast(nn.Module, self.module.mlp)
        stored = cast(Tensor, read(below, name))
        rows = len(stored) // self.num_experts
        return stored[index * rows : (index + 1) * rows].to(execution_device(below))

    def _activation(self, projected: Tensor) -> Tensor:
        return cast(Tensor, self.module.mlp.activation_fn(projected))  # type: ignore[operator, union-attr]
