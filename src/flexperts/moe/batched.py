"""Batched experts: every expert runs on every token, and the router's score multiplies the expert's INPUT.

    F(x) = sum_j E_j(g_j(x) x)        g_j(x) = 0 outside of the top K

The experts module takes the scaled x ``[N * T, D]``, ordered by expert. The block above it adds a shared expert and
returns (output, router logits). A term is added to the block's output and computed from the unscaled x: a personal
expert adds sigmoid(G(x)) E_p(x), as in every other layout, not E_p(sigmoid(G(x)) x). An expert is not linear: a
gate on its input would not scale its output. On the output, gates and the selection's constants mean the same in
every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexperts.moe.fused import holds_fused
from flexperts.moe.layout import ExpertWeights, LayerExperts, Note, Term, num_arguments
from flexperts.moe.stored import read_part


@dataclass(frozen=True)
class BatchedExperts(LayerExperts):
    """Experts in fused tensors ``[N, in, out]`` behind a block that scales their input.

    Args:
        parent: The block that contains the experts module, the ``router`` and a shared expert.
    """

    parent: nn.Module

    takes_routing: ClassVar[bool] = False

    @classmethod
    def recognise(cls, name: str, module: nn.Module, parent: nn.Module) -> Self | None:
        """Recognise fused tensors in a module that is called with x only, next to a router with ``top_k``."""
        count = getattr(module, "num_experts", None)
        if not isinstance(count, int) or not holds_fused(module, count) or num_arguments(module) != 1:
            return None
        return cls(name, module, parent) if hasattr(getattr(parent, "router", None), "top_k") else None

    @property
    def is_transposed(self) -> bool:
        """Weights are stored input-major."""
        return True

    def expert(self, index: int) -> ExpertWeights:
        """Return expert ``index`` as detached views into the fused tensors."""
        parts = (read_part(self.module, name, index) for name in ("gate_up_proj", "down_proj"))
        return ExpertWeights(*parts)  # type: ignore[arg-type]

    def add(self, term: Term) -> RemovableHandle:
        """Add ``term``, computed from the unscaled input, to the block's output."""

        def added(_block: nn.Module, args: tuple[Tensor, ...], output: tuple[Any, ...]) -> tuple[Any, ...] | None:
            extra = term(args[0].reshape(-1, args[0].shape[-1]))
            return None if extra is None else (output[0] + extra.to(output[0].dtype), *output[1:])

        return self.parent.register_forward_hook(added)

    def watch(self, note: Note) -> Iterator[RemovableHandle]:
        """Record every call: the unscaled x at the router, the output without the shared expert at the experts."""
        router: Any = self.parent.router
        routed: list[tuple[Tensor, ...]] = []  # the router's x, scores and logits in the call that is running

        def seen(_module: nn.Module, _args: object, output: Tensor) -> None:
            hidden, scores, logits = routed.pop()
            index = logits.topk(router.top_k, dim=-1).indices
            note(hidden, index, scores.gather(-1, index), output.view(-1, *hidden.shape).sum(0))

        yield router.register_forward_hook(lambda _router, args, output: routed.append((args[0], *output)))
        yield self.module.register_forward_hook(seen)
