"""Which experts of a layer learn from a batch: the most valuable ones, within a budget.

Shapes: T tokens, K experts per token, N experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexperts.moe.layout import LayerExperts


@dataclass
class Usage:
    """What one round showed of a layer's experts; all tensors are float64 ``[N]`` on the CPU.

    Args:
        weight: Sum over tokens of G_e(x), the weight that the router gave.
        score: Sum over batches of s_e.
        learned: Batches in which the expert carried gradient.
        tokens: Tokens seen, padding left out.
        batches: Batches seen.
    """

    weight: Tensor
    score: Tensor
    learned: Tensor
    tokens: int = 0
    batches: int = 0


def routing_matrix(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Return G ``[T, N]`` in float64 on the CPU: the router's weight of each expert for each token, or 0."""
    zeros = torch.zeros(len(index), num_experts, dtype=torch.float64)
    return zeros.scatter_add(1, index.cpu(), weights.detach().double().cpu())


def scores_of(routing: Tensor, lam: float) -> Tensor:
    """Return s_e ``[N]`` = lam mean_x G_e(x) + (1 - lam) max_x G_e(x)."""
    return lam * routing.mean(0) + (1 - lam) * routing.amax(0)


def values_of(routing: Tensor, lam: float, beta: float) -> Tensor:
    """Return I_e ``[N]`` = s_e - beta mean_x G_e(x) log(G_e(x) / mean G_e), with 0 log 0 = 0."""
    mean = routing.mean(0)
    ratio = torch.where(routing > 0, routing / mean.clamp_min(1e-300), torch.ones_like(routing))
    return scores_of(routing, lam) - beta * (routing * ratio.log()).mean(0)


@dataclass
class ExpertBudget:
    """Chooses the learning experts of every layer and batch, and keeps count: an ``ExpertAdapters.gradient_for``.

    Args:
        budget: Share of a layer's experts that carry gradient.
        lam, beta: As in ``scores_of`` and ``values_of``.
        usage: What was seen, by experts module.
    """

    budget: float
    lam: float
    beta: float
    usage: dict[str, Usage] = field(default_factory=dict)
    _mask: Tensor | None = None
    _chosen: dict[str, set[int]] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know, inside the block, where every forward pass begins and which of its tokens are padding."""
        handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def __call__(self, experts: LayerExperts, index: Tensor, weights: Tensor) -> Collection[int]:
        """Return the experts that learn; checkpointing's second question gets the first answer."""
        if experts.name not in self._chosen:
            # Without gradient: checkpointing counts the tensors that the first question and the second save.
            tokens = slice(None) if self._mask is None else self._mask.to(index.device)
            self._chosen[experts.name] = self._choose(experts, index[tokens], weights[tokens])
        return self._chosen[experts.name]

    def _begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask, self._chosen = None if mask is None else mask.flatten().bool(), {}

    def _choose(self, experts: LayerExperts, index: Tensor, weights: Tensor) -> set[int]:
        routing = routing_matrix(index, weights, experts.num_experts)
        count = max(1, round(self.budget * experts.num_experts))
        value = values_of(routing, self.lam, self.beta)
        chosen = set(value.argsort(descending=True, stable=True)[:count].tolist())
        self._note(experts, routing, chosen)
        return chosen

    def _note(self, experts: LayerExperts, routing: Tensor, chosen: set[int]) -> None:
        zeros = torch.zeros(3, experts.num_experts, dtype=torch.float64)
        usage = self.usage.setdefault(experts.name, Usage(*zeros))
        usage.weight += routing.sum(0)
        usage.score += scores_of(routing, self.lam)
        # Chosen but never routed to: nothing reached it.
        reached = [e for e in chosen if routing[:, e].any()]
        usage.learned[reached] += 1
        usage.tokens += len(routing)
        usage.batches += 1
