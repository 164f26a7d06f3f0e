"""Fused experts, as in nearly every family: tensors ``[N, ...]`` in a module called with (x, index, weights).

Source: transformers ``integrations/moe.py`` (``use_experts_implementation``), whose contract is
``forward(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, cast

from torch import Tensor, nn

from flexperts.moe.layout import ExpertWeights, LayerExperts, num_arguments, own_parameters
from flexperts.moe.stored import lies_whole, read_part

_TOGETHER = 2**20
"""Most values of all experts' up projections that fit a CPU's cache; with more, one by one is faster there."""
AT_ONCE = 2**24
"""Values of several experts' up projections that a card computes at once: some 0.3 GB with what is made of them."""


@dataclass(frozen=True)
class FusedExperts(LayerExperts):
    """Experts that follow the contract of transformers; flags that transformers sets describe the variants."""

    @classmethod
    def recognise(cls, name: str, module: nn.Module, parent: nn.Module) -> Self | None:
        """Recognise the contract by tensors and signature."""
        count = getattr(module, "num_experts", None)
        holds = isinstance(count, int) and holds_fused(module, count)
        return cls(name, module) if holds and num_arguments(module) == 3 else None

    @property
    def has_gate(self) -> bool:
        """Whether the up projection contains gate and up (U = 2 I)."""
        return hasattr(self.module, "gate_up_proj")

    @property
    def is_transposed(self) -> bool:
        """Whether weights are stored input-major, as ``[N, in, out]``."""
        return bool(getattr(self.module, "is_transposed", False))

    def expert(self, index: int) -> ExpertWeights:
        """Return expert ``index`` as detached views into the fused tensors; in memory nothing is copied."""
        return self._weights(index)

    def _weights(self, index: int | slice) -> ExpertWeights:
        up = "gate_up_proj" if self.has_gate else "up_proj"
        names = (up, "down_proj", f"{up}_bias", "down_proj_bias")
        parts = (read_part(self.module, name, index) for name in names)
        return ExpertWeights(*parts)  # type: ignore[arg-type]

    def run_all(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield all experts' outputs: one by one, or several at once where that is faster."""
        several = self._at_once(hidden)
        if several == 1 or not lies_whole(self.module):
            yield from super().run_all(hidden)
            return
        for first in range(0, self.num_experts, several):
            yield self._run_some(hidden, slice(first, min(first + several, self.num_experts)))

    def _at_once(self, hidden: Tensor) -> int:
        """Return the number of experts to compute at once."""
        values = len(hidden) * (self.expert(0).up.numel() // self.width)
        if hidden.device.type == "cpu":
            return self.num_experts if self.num_experts * values <= _TOGETHER else 1
        return max(1, AT_ONCE // values)

    def _run_some(self, hidden: Tensor, which: slice) -> Tensor:
        some = self._weights(which)
        up, down = (w if self.is_transposed else w.mT for w in (some.up, some.down))
        # Computed as [n, U, T], so that each half for the activation is contiguous.
        projected = (up.mT @ hidden.T).mT
        if some.up_bias is not None:
            projected = projected + some.up_bias.unsqueeze(1)
        outputs = self.activate(projected) @ down
        if some.down_bias is not None:
            outputs = outputs + some.down_bias.unsqueeze(1)
        return self.finish(outputs)

    def activate(self, projected: Tensor) -> Tensor:
        """Return the intermediate ``[T, I]`` of an up projection ``[T, U]``, by the module's rule."""
        if self.has_gate and hasattr(self.module, "_apply_gate"):
            return cast(Tensor, self.module._apply_gate(projected))  # type: ignore[operator]
        return super().activate(projected)

    def finish(self, output: Tensor) -> Tensor:
        """Return ``output [T, D]`` after the norm that a few families apply to each expert."""
        if getattr(self.module, "has_post_expert_norm", False):
            return cast(Tensor, self.module.post_expert_norm(output))  # type: ignore[operator]
        return output


@dataclass(frozen=True)
class FusedExpertsWithIdentities(FusedExperts):
    """The same contract, where the router may also choose numbers from N on; these return x unchanged."""

    @classmethod
    def recognise(cls, name: str, module: nn.Module, parent: nn.Module) -> Self | None:
        """Recognise the contract by tensors, signature and two counts; the tensors may have unused rows."""
        routed, identities = (getattr(module, n, None) for n in ("num_routed_experts", "zero_expert_num"))
        if not isinstance(routed, int) or not isinstance(identities, int):
            return None
        holds = holds_fused(module, routed, idle=identities)
        return cls(name, module) if holds and num_arguments(module) == 3 else None

    @property
    def num_experts(self) -> int:
        """N, the number of experts with weights."""
        return cast(int, self.module.num_routed_experts)

    @property
    def num_identities(self) -> int:
        """Number of the router's additional choices, from N on, that return x unchanged."""
        return cast(int, self.module.zero_expert_num)


def holds_fused(module: nn.Module, count: int, idle: int = 0) -> bool:
    """Return whether a module's tensors are those of ``count`` fused experts; some may have ``idle`` more rows."""
    own = own_parameters(module)
    if "down_proj" not in own or not ({"gate_up_proj", "up_proj"} & own.keys()):
        return False
    shapes = [p.shape for p in own.values()]
    return any(len(s) == 3 for s in shapes) and all(s[0] in (count, count + idle) for s in shapes)
