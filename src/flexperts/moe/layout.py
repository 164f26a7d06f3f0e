"""The routed experts of one layer, independent of how its model stores and calls them.

The rest of the package uses a layer's experts only as ``LayerExperts``: how many there are, how one is read, how a
term is added to their output, how a call is recorded. Each layout is one file: ``fused`` (nearly every family),
``flat``, ``batched``, ``parallel``. ``experts.find_experts`` recognizes them by structure.

Shapes: T tokens, D expert input and output width, I intermediate width, U = 2 I (gated) or I, N experts, K experts
per token.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Term = Callable[[Tensor], Tensor | None]
"""Hidden states x ``[..., D]`` -> the term added to the layer's output ``[..., D]``, or None for no term."""
Note = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(x ``[T, D]``, index ``[T, K]``, weights ``[T, K]``, routed output F(x) ``[T, D]``) of one call."""


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's tensors, as views into the stored ones or as copies of them.

    Args:
        up: ``[U, D]``, or ``[D, U]`` where the layout is transposed.
        down: ``[D, I]``, or ``[I, D]`` where the layout is transposed.
        up_bias: ``[U]`` or None.
        down_bias: ``[D]`` or None.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the tensors that are present."""
        for name in ("up", "down", "up_bias", "down_bias"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor


@dataclass(frozen=True)
class LayerExperts(ABC):
    """A layer's routed experts. The defaults here fit a module that is called as ``module(x, index, weights)``.

    Args:
        name: Qualified name in the model, such as ``model.layers.4.mlp.experts``.
        module: The module with this name.
    """

    name: str
    module: nn.Module

    takes_routing: ClassVar[bool] = True
    """Whether ``module`` is called with (x, index, weights), so that its forward can be replaced."""

    @classmethod
    @abstractmethod
    def recognise(cls, name: str, module: nn.Module, parent: nn.Module) -> Self | None:
        """Return the experts of ``module`` if they have this layout, else None."""

    @abstractmethod
    def expert(self, index: int) -> ExpertWeights:
        """Return expert ``index``, detached; as views of the stored tensors where the layout allows it."""

    @property
    def num_experts(self) -> int:
        """N, the number of routed experts."""
        return cast(int, self.module.num_experts)

    @property
    def num_identities(self) -> int:
        """Number of the router's additional choices, from N on, that return x unchanged."""
        return 0

    @property
    def block(self) -> str:
        """Name of the module that contains both the experts and their router."""
        return self.name.rpartition(".")[0]

    @property
    def stored(self) -> list[nn.Parameter]:
        """The model's parameters that store this layer's routed experts."""
        return list(self.module.parameters())

    @property
    def has_gate(self) -> bool:
        """Whether the up projection contains gate and up (U = 2 I)."""
        return True

    @property
    def is_transposed(self) -> bool:
        """Whether ``expert`` returns its weights input-major, as ``[in, out]``."""
        return False

    @property
    def width(self) -> int:
        """D, read from the tensors: some families run their experts in a latent space."""
        return self.expert(0).up.shape[0 if self.is_transposed else 1]

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the frozen weights."""
        return self.expert(0).up.dtype

    @property
    def device(self) -> torch.device:
        """Device of the frozen weights."""
        return self.expert(0).up.device

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply one stored matrix to ``hidden [T, in]`` in the layout's orientation."""
        return F.linear(hidden, weight.T if self.is_transposed else weight, bias)

    def activate(self, projected: Tensor) -> Tensor:
        """Return the intermediate ``[T, I]`` of an up projection ``[T, U]``, by the model's rule."""
        if not self.has_gate:
            return self._activation(projected)
        gate, up = projected.chunk(2, dim=-1)
        return self._activation(gate) * up

    def finish(self, output: Tensor) -> Tensor:
        """Return ``output [T, D]`` after a final step that a few families apply to each expert."""
        return output

    def run(self, hidden: Tensor, weights: ExpertWeights) -> Tensor:
        """Return one expert's unweighted output ``[T, D]`` for ``hidden [T, D]``."""
        intermediate = self.activate(self.project(hidden, weights.up, weights.up_bias))
        return self.finish(self.project(intermediate, weights.down, weights.down_bias))

    def run_all(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield all experts' unweighted outputs for ``hidden [T, D]``, in order, in groups ``[n, T, D]``."""
        return (self.run(hidden, self.expert(i))[None] for i in range(self.num_experts))

    def add(self, term: Term) -> RemovableHandle:
        """Add ``term`` to the experts' output, in the output's dtype; return the hook's handle."""

        def added(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            extra = term(args[0])
            return None if extra is None else output + extra.to(output.dtype)

        return self.module.register_forward_hook(added)

    def watch(self, note: Note) -> Iterator[RemovableHandle]:
        """Call ``note`` at every call of the experts; yield the hooks' handles."""

        def seen(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            note(*(t.reshape(-1, t.shape[-1]) for t in (*args, output)))

        yield self.module.register_forward_hook(seen)

    def _activation(self, projected: Tensor) -> Tensor:
        return cast(Tensor, self.module.act_fn(projected))  # type: ignore[operator]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``module`` without those of its children, by name."""
    return dict(module.named_parameters(recurse=False))


def num_arguments(module: nn.Module) -> int:
    """Return the number of arguments of the forward of ``module``'s class, without self."""
    return len(inspect.signature(type(module).forward).parameters) - 1
