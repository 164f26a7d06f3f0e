"""Adapting pretrained experts in place: the router's choice stays, the adapted experts use trained weights.

    y = sum_{j in TopK, j not adapted} g_j(x) E_j(x)  +  sum_{e in TopK, e adapted} g_e(x) E'_e(x)

Shapes: T tokens, D expert width, K experts per token, N experts. The sums follow transformers' eager experts loop:
an expert's output times its weight, cast to the hidden dtype, added by index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn

from flexperts.errors import GraftError
from flexperts.moe.layout import LayerExperts
from flexperts.parts.part import Part, Removable, key
from flexperts.parts.personal_expert import Rank, personal_expert

Streams = Generator | Callable[[str, int], Generator]
"""One random stream for all experts, or a function (experts module's name, expert) -> stream of that expert."""
GradientFor = Callable[[LayerExperts, Tensor, Tensor], Collection[int]]
"""(experts module, index ``[T, K]``, weights ``[T, K]``) -> the experts that learn from this call."""


class AdaptedLayer(nn.ModuleDict):
    """The adapted experts of one MoE layer, by number.

    Args:
        experts: The layer's experts module.
        indices: Which of its experts are adapted, all different, at least one.
        rank: LoRA rank, or ``"full"`` for trainable copies.
        alpha: LoRA scaling numerator; not used by ``"full"``.
        generator: Stream for LoRA's A, or one for each expert.
        dropout: Dropout on LoRA's input in training; not used by ``"full"``.
    """

    def __init__(
        self,
        experts: LayerExperts,
        indices: Sequence[int],
        rank: Rank,
        alpha: float,
        generator: Streams,
        dropout: float,
    ) -> None:
        _check_layout(experts)
        _check_indices(experts, indices)
        streams = (lambda _name, _index: generator) if isinstance(generator, Generator) else generator
        own = {i: personal_expert(experts, i, rank, alpha, streams(experts.name, i), dropout) for i in indices}
        super().__init__({str(i): expert for i, expert in own.items()})
        self.experts, self.indices = experts, tuple(indices)
        self.register_buffer("_chosen", torch.tensor(self.indices), persistent=False)
        self.to(experts.device)

    @property
    def is_whole(self) -> bool:
        """Whether every choice of the router is adapted, so that the base's experts are not needed."""
        return len(self.indices) == self.experts.num_experts + self.experts.num_identities

    def among(self, index: Tensor) -> Tensor:
        """Return whether each routing slot of ``index [T, K]`` holds an adapted expert: ``[T, K]`` bool."""
        return torch.isin(index, cast(Tensor, self._chosen))

    def keep(self, index: Tensor, weights: Tensor) -> Tensor:
        """Return ``weights [T, K]`` with 0 for experts that are not adapted; the others are scaled to the old sum.

        Identities are not experts: their slots stay.
        """
        stays = self.among(index) | (index >= self.experts.num_experts)
        kept = weights.masked_fill(~stays, 0).float()
        before, after = weights.float().sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        # For a token with nothing kept, divide by 1: its weights stay zero, and its gradient has no NaN.
        return (kept * (before / torch.where(after == 0, 1.0, after))).to(weights.dtype)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor, learning: Collection[int]) -> Tensor:
        """Return the adapted experts' weighted sum ``[T, D]``; experts outside ``learning`` pass no gradient."""
        total = torch.zeros_like(hidden)
        # Slots before tokens, as in the base's loop: equal row order gives equal bits.
        matches = index.T.flatten() == cast(Tensor, self._chosen)[:, None]
        counts = matches.sum(1).tolist()  # a card is waited for here only
        order = torch.where(matches.any(0), matches.int().argmax(0), len(counts)).argsort(stable=True)
        for expert, places in zip(self.indices, torch.split(order[: sum(counts)], counts), strict=True):
            if not len(places):
                continue
            slot, token = places // len(index), places % len(index)
            with torch.set_grad_enabled(torch.is_grad_enabled() and expert in learning):
                output = self[str(expert)](hidden[token])
            total.index_add_(0, token, (output * weights[token, slot, None]).to(total.dtype))
        return total


class ExpertAdapters(Part):
    """Adapters on pretrained routed experts; an adapter replaces its expert for tokens routed to it.

    Args:
        experts: The base's experts modules, from ``find_experts``.
        choice: Experts to adapt by experts module; modules that are not named do not change.
        rank, alpha, generator, dropout: See ``AdaptedLayer``; one stream is used module after module. If clients
            adapt different experts, an expert starts alike on all of them only with one stream per expert.
        restrict: Use only the chosen experts: the weights of other experts are 0, and the kept weights are scaled
            so that a token's sum of weights stays; a token without a chosen expert has a routed output of 0.
        gradient_for: While the experts module trains, only the adapted experts that this returns pass gradient, to
            their parameters and to the hidden states; frozen experts are not affected. It receives the weights that
            are used (after ``restrict``), and must return the same when checkpointing calls it again.
    """

    def __init__(
        self,
        experts: Sequence[LayerExperts],
        choice: Mapping[str, Sequence[int]],
        rank: Rank = "full",
        alpha: float = 16.0,
        generator: Streams | None = None,
        *,
        dropout: float = 0.0,
        restrict: bool = False,
        gradient_for: GradientFor | None = None,
    ) -> None:
        super().__init__()
        generator = generator or torch.Generator().manual_seed(0)
        self.restrict, self.gradient_for = restrict, gradient_for
        names = [e.name for e in experts]
        if unknown := sorted(choice.keys() - set(names)):
            raise GraftError(f"choice names {unknown}", f"experts modules are {names}", "choose again on this base")
        self.layers = nn.ModuleDict(
            {
                key(e.name): AdaptedLayer(e, choice[e.name], rank, alpha, generator, dropout)
                for e in experts
                if e.name in choice
            }
        )

    @property
    def choice(self) -> dict[str, tuple[int, ...]]:
        """The experts that are adapted, by experts module."""
        return {layer.experts.name: layer.indices for layer in self}

    def __iter__(self) -> Iterator[AdaptedLayer]:
        return iter(self.layers.values())  # type: ignore[arg-type]

    def hooks(self) -> Iterator[Removable]:
        """Replace each experts module's forward; other hooks on the module still work."""
        for layer in self:
            if isinstance(vars(layer.experts.module).get("forward"), _Forward):
                raise GraftError(
                    f"{layer.experts.name} is adapted already",
                    "a module can have one set of adapters",
                    "detach the other adapters first",
                )
        for layer in self:
            yield _Forward(self, layer)

    def compute(
        self, layer: AdaptedLayer, base: Callable[[Tensor, Tensor, Tensor], Tensor], *args: Tensor
    ) -> Tensor:
        """Return a layer's routed output ``[T, D]`` for the arguments of its experts module."""
        hidden, index, weights = args
        if not self.enabled:
            return base(*args)
        if self.restrict:
            weights = layer.keep(index, weights)
        adapted: Tensor = layer(hidden, index, weights, self._learning(layer, index, weights))
        if layer.is_whole or (self.restrict and not layer.experts.num_identities):
            return adapted
        rest: Tensor = base(hidden, index, weights.masked_fill(layer.among(index), 0))
        return rest + adapted

    def _learning(self, layer: AdaptedLayer, index: Tensor, weights: Tensor) -> Collection[int]:
        if self.gradient_for is None or not layer.experts.module.training:
            return layer.indices
        # Slots without an expert (identities) get weight 0.
        real = index < layer.experts.num_experts
        return self.gradient_for(layer.experts, index * real, weights.detach() * real)


class _Forward:
    """Replacement of one experts module's ``forward`` until it is removed."""

    def __init__(self, part: ExpertAdapters, layer: AdaptedLayer) -> None:
        self.part, self.layer, self.module = part, layer, layer.experts.module
        self.previous = vars(self.module).get("forward")
        self.base = self.module.forward
        self.module.forward = self

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the module's output, of the shape of ``hidden``; some models call it with ``[B, S, D]``."""

        def base(*args: Tensor) -> Tensor:
            output: Tensor = self.base(*args)
            return output.view(args[0].shape)

        return self.part.compute(self.layer, base, hidden.flatten(0, -2), index, weights).view(hidden.shape)

    def remove(self) -> None:
        """Restore the module's forward."""
        if self.previous is None:
            del self.module.forward
        else:
            self.module.forward = self.previous


def _check_layout(experts: LayerExperts) -> None:
    if not experts.takes_routing:
        raise GraftError(
            f"{experts.name} ({type(experts).__name__})",
            "only experts whose module is called with (x, index, weights) can be adapted in place",
            "use a method that adds grafts, such as flex, or another base",
        )


def _check_indices(experts: LayerExperts, indices: Sequence[int]) -> None:
    good = set(range(experts.num_experts))
    if not indices or len(set(indices)) != len(indices) or not set(indices) <= good:
        raise GraftError(
            f"{experts.name}: adapters for the experts {list(indices)}",
            f"they must be different numbers from 0 to {experts.num_experts - 1}",
            "choose again on this base",
        )
