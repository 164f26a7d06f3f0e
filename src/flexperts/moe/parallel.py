"""Parallel experts: a block sorts tokens by expert and passes them to two modules with weights ``[N, out, in]``.

There is no experts module; the block takes its place. It also adds a bias after the experts. Attention can have
such modules too; they do not count as experts of the layer's MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexperts.moe.layout import ExpertWeights, LayerExperts, Note, own_parameters
from flexperts.moe.stored import read_part

_MODULES = ("input_linear", "output_linear")


@dataclass(frozen=True)
class ParallelExperts(LayerExperts):
    """Experts in two modules of a block whose router returns (order, token, gate, counts, logits), sorted."""

    takes_routing: ClassVar[bool] = False

    @classmethod
    def recognise(cls, name: str, module: nn.Module, parent: nn.Module) -> Self | None:
        """Recognise a block with both modules, a router and an activation; attention has no activation."""
        up, down = (getattr(module, n, None) for n in _MODULES)
        if not isinstance(up, nn.Module) or not isinstance(down, nn.Module):
            return None
        weights = [own_parameters(m).get("weight") for m in (up, down)]
        fused = all(
            w is not None and w.dim() == 3 and w.shape[0] == getattr(up, "num_experts", None) for w in weights
        )
        return cls(name, module) if fused and hasattr(module, "router") and hasattr(module, "activation") else None

    @property
    def num_experts(self) -> int:
        """N, the number of routed experts."""
        return cast(int, self.module.input_linear.num_experts)  # type: ignore[union-attr]

    @property
    def block(self) -> str:
        """Name of the module itself."""
        return self.name

    @property
    def stored(self) -> list[nn.Parameter]:
        """Both modules' weights; the block's bias belongs to no expert."""
        return [getattr(self.module, name).weight for name in _MODULES]

    def expert(self, index: int) -> ExpertWeights:
        """Return expert ``index`` as detached views into both modules' weights."""
        parts = (read_part(getattr(self.module, name), "weight", index) for name in _MODULES)
        return ExpertWeights(*parts)  # type: ignore[arg-type]

    def watch(self, note: Note) -> Iterator[RemovableHandle]:
        """Record every call of the block, with the routing in the tokens' order."""
        routed: list[tuple[Any, ...]] = []  # what the router returned in the call that is running

        def seen(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            hidden, summed = (t.reshape(-1, t.shape[-1]) for t in (args[0], output))
            order, _, gates, counts, _ = routed.pop()
            experts = torch.arange(len(counts), device=order.device)
            sorted_experts = experts.repeat_interleave(torch.tensor(counts, device=order.device))
            index, gates = (_unsorted(values, order).view(len(hidden), -1) for values in (sorted_experts, gates))
            note(hidden, index, gates, summed - cast(Tensor, block.bias))

        yield self.module.router.register_forward_hook(lambda _router, _args, output: routed.append(output))  # type: ignore[union-attr]
        yield self.module.register_forward_hook(seen)

    def _activation(self, projected: Tensor) -> Tensor:
        return cast(Tensor, self.module.activation(projected))  # type: ignore[operator]


def _unsorted(values: Tensor, order: Tensor) -> Tensor:
    """Return ``values`` of sorted slots in the slots' original order."""
    return torch.empty_like(values).index_copy(0, order, values)
