"""A frozen low-rank delta of any rank on Linear layers: y = W x + scale * B (A x), never merged into W.

Federations that stack clients' LoRA factors instead of averaging them make such deltas. Shapes: R stacked rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.errors import GraftError
from flexperts.parts.part import Part, Removable, key, submodule


class StackedLora(Part):
    """Frozen factors on named modules; they are buffers, so they are neither trained nor part of a split.

    Args:
        model: The base, with or without PEFT's wrappers around its Linear layers.
        factors: Module name -> (A ``[R, in]``, B ``[out, R]``); the module maps ``[..., in]`` to ``[..., out]``.
            Empty: no module gets a delta.
        scale: Factor of B A.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self._sites = {name: submodule(model, name) for name in factors}
        self.layers = nn.ModuleDict({key(n): _Factors(n, *pair) for n, pair in factors.items()})
        for name, module in self._sites.items():
            self.layers[key(name)].to(next(module.parameters()).device)

    def load(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Replace the factors of the named modules by factors of any rank; other modules do not change."""
        for name, (A, B) in factors.items():
            if name not in self._sites:
                raise GraftError(
                    f"factors for {name!r}", "it has no delta here", "add the module to the constructor's factors"
                )
            old: Any = self.layers[key(name)]
            if (A.shape[1:], B.shape[:1]) != (old.A.shape[1:], old.B.shape[:1]):
                raise GraftError(
                    f"{name} gets A {list(A.shape)} and B {list(B.shape)}",
                    f"it maps {old.A.shape[1]} features to {old.B.shape[0]}",
                    "give factors of this module",
                )
            self.layers[key(name)] = _Factors(name, A.to(old.A), B.to(old.B))

    def hooks(self) -> Iterator[Removable]:
        """Add every delta to its module's output."""
        for name, module in self._sites.items():
            yield module.register_forward_hook(self._hook(key(name)))

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.enabled:
                return output
            delta: Tensor = self.layers[name](args[0].to(output.dtype))
            return output + self.scale * delta

        return add


class _Factors(nn.Module):
    """B (A x) for one module."""

    A: Tensor
    B: Tensor

    def __init__(self, name: str, A: Tensor, B: Tensor) -> None:
        super().__init__()
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise GraftError(
                f"{name} gets A {list(A.shape)} and B {list(B.shape)}",
                "they must be [R, in] and [out, R]",
                "give factors of one rank",
            )
        self.register_buffer("A", A.detach())
        self.register_buffer("B", B.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(F.linear(hidden, self.A.to(hidden.dtype)), self.B.to(hidden.dtype))
