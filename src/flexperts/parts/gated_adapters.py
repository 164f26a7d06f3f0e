"""A shared and a personal bottleneck expert parallel to each MoE layer, mixed per token by a personal gate.

    y = routed(x) + a_0(x) G(x) + a_1(x) F(x)        a(x) = softmax(W2 sigmoid(W1 x)) or softmax(W x), in R^2

G is averaged over clients, F and the gate stay. Shapes: T tokens, D expert width, r rank, h gate width.
Source: pFedMoE (arXiv 2402.01350), in the low-rank form of CoMiGS (arXiv 2409.13931) for language models, whose own
gate is the linear one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from flexperts.moe.layout import LayerExperts
from flexperts.parts.part import Part, Removable, key, uniform_matrix


class Bottleneck(nn.Module):
    """scale * up (down x): a low-rank expert; ``up`` starts at zero, so the initial output is zero.

    Args:
        width: ``D``.
        rank: r, at least 1.
        scale: Factor of the output.
        generator: Stream for ``down``.
    """

    def __init__(self, width: int, rank: int, scale: float, generator: Generator) -> None:
        super().__init__()
        self.scale = scale
        self.down = uniform_matrix(rank, width, generator)
        self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[T, D]`` for ``hidden [T, D]``."""
        low = F.linear(hidden, self.down.to(hidden.dtype))
        return F.linear(low, self.up.to(low.dtype)) * self.scale


class TokenGate(nn.Module):
    """softmax(W2 sigmoid(W1 x)): a token's weights of the shared and the personal expert.

    Args:
        width: ``D``.
        hidden_width: ``h``.
        generator: Stream for W1 and W2.
    """

    def __init__(self, width: int, hidden_width: int, generator: Generator) -> None:
        super().__init__()
        self.W1 = uniform_matrix(hidden_width, width, generator)
        self.W2 = uniform_matrix(2, hidden_width, generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[T, 2]``, positive with sum 1, for ``hidden [T, D]``: (shared, personal)."""
        inner = torch.sigmoid(F.linear(hidden, self.W1.to(hidden.dtype)))
        return F.linear(inner, self.W2.to(inner.dtype)).softmax(-1)


class LinearGate(nn.Module):
    """softmax(W x): a token's weights of the shared and the personal expert.

    Args:
        width: ``D``.
        generator: Stream for W.
    """

    def __init__(self, width: int, generator: Generator) -> None:
        super().__init__()
        self.W = uniform_matrix(2, width, generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[T, 2]``, as ``TokenGate`` does."""
        return F.linear(hidden, self.W.to(hidden.dtype)).softmax(-1)


class GatedPair(nn.Module):
    """The two experts and the gate of one MoE layer.

    Args:
        experts: The layer's experts module.
        rank, scale: Rank and output factor of both experts.
        gate_width: ``h``; None makes the gate linear.
        generator: Stream for shared expert, personal expert and gate, in this order.
        dropout: Dropout on the experts' input while their module is in training mode; the gate's is whole.
    """

    def __init__(
        self,
        experts: LayerExperts,
        rank: int,
        scale: float,
        gate_width: int | None,
        generator: Generator,
        dropout: float,
    ) -> None:
        super().__init__()
        self.experts, self.dropout = experts, dropout
        self.shared = Bottleneck(experts.width, rank, scale, generator)
        self.personal = Bottleneck(experts.width, rank, scale, generator)
        self.gate: nn.Module = (
            LinearGate(experts.width, generator)
            if gate_width is None
            else TokenGate(experts.width, gate_width, generator)
        )
        self.to(experts.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the pair's addition to the layer's routed output, ``[T, D]``."""
        shared, personal = self.gate(hidden).unsqueeze(-1).unbind(-2)
        output: Tensor = shared * self.shared(self._dropped(hidden)) + personal * self.personal(
            self._dropped(hidden)
        )
        return output

    def _dropped(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.experts.module.training)


class GatedAdapters(Part):
    """All gated pairs of one client.

    Args:
        experts: The base's experts modules, from ``find_experts``; each gets a pair.
        rank: r of both experts.
        alpha: Scaling numerator: an expert's output is multiplied by alpha / rank.
        gate_width: h, width of the gate's inner layer; None makes the gate linear.
        generator: Stream for all initial values.
        dropout: See ``GatedPair``.
    """

    def __init__(
        self,
        experts: Sequence[LayerExperts],
        *,
        rank: int = 8,
        alpha: float = 16.0,
        gate_width: int | None = 8,
        generator: Generator | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        stream = generator or torch.Generator().manual_seed(0)
        self.layers = nn.ModuleDict(
            {key(e.name): GatedPair(e, rank, alpha / rank, gate_width, stream, dropout) for e in experts}
        )

    def __iter__(self) -> Iterator[GatedPair]:
        return iter(self.layers.values())  # type: ignore[arg-type]

    def hooks(self) -> Iterator[Removable]:
        """Attach every pair to its layer's experts."""
        for pair in self:
            yield self.beside(pair.experts, pair)

    @contextmanager
    def shared_alone(self) -> Iterator[None]:
        """Fix the gate to (1, 0) inside the block: G at full weight."""

        def all_to_shared(_gate: nn.Module, _args: object, weights: Tensor) -> Tensor:
            return weights.new_tensor([1.0, 0.0]).expand_as(weights)

        with ExitStack() as stack:
            for pair in self:
                stack.callback(pair.gate.register_forward_hook(all_to_shared).remove)
            yield
