"""What the selection of experts reads: how a layer's routed output and its experts relate on a client's own tokens.

    s* = argmin_s  sum_x || F(x) - E_s(x) ||^2        F(x) = sum_{j in TopK} g_j(x) E_j(x)

With one expert kept, its re-normalised router weight is 1. All layers are scored in ONE forward pass: hooks add
inner products in float64 and store no output. Every rule in ``rules`` works on these sums alone.
Shapes: T tokens, D width, N experts, K experts per token.
Source: FLEx (arXiv 2506.00965), after the layer-wise criterion of Lu et al., ACL 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Generator, Tensor

from flexperts.errors import GraftError
from flexperts.moe.layout import LayerExperts, Note

Batch = Mapping[str, Tensor]
STACK = 2**26
"""Values of all experts' outputs that are held at once; 512 MiB in float64."""


@dataclass
class LayerScores:
    """Sums of one experts module over the calibration tokens x; all tensors are float64 on the CPU.

    Args:
        name: Experts module name.
        gram: ``[N, N]``, sum of E_s(x) . E_t(x).
        cross: ``[N]``, sum of F(x) . E_s(x).
        energy: Sum of ||F(x)||^2.
        counts: ``[N]``, tokens that the router sent to each expert.
        weights: ``[N]``, sum of the router weights that each expert got.
        tokens: Calibration tokens that were scored.
    """

    name: str
    gram: Tensor
    cross: Tensor
    energy: float
    counts: Tensor
    weights: Tensor
    tokens: int

    @classmethod
    def empty(cls, name: str, num_experts: int) -> Self:
        """Return the sums before any token."""
        cross, counts, weights = torch.zeros(3, num_experts, dtype=torch.float64)
        return cls(name, torch.zeros(num_experts, num_experts, dtype=torch.float64), cross, 0.0, counts, weights, 0)

    @property
    def errors(self) -> Tensor:
        """``[N]`` float64, sum over tokens of ||F - E_s||^2."""
        return (self.energy - 2 * self.cross + self.gram.diagonal()).clamp_min(0)

    @property
    def relative(self) -> Tensor:
        """``[N]`` errors over the routed output's energy: 1 is as bad as predicting zero."""
        return self.errors / max(self.energy, 1e-30)

    def best(self, k: int) -> tuple[int, ...]:
        """Return the k experts with the smallest error, best first.

        Raises:
            GraftError: k is not from 1 to N.
        """
        self.check_count(k)
        return tuple(int(i) for i in self.errors.argsort(stable=True)[:k])

    def check_count(self, k: int) -> None:
        """Refuse to choose k of the N experts where that cannot be done.

        Raises:
            GraftError: k is not from 1 to N.
        """
        if not 1 <= k <= len(self.cross):
            rule = f"{self.name} has {len(self.cross)} experts"
            raise GraftError(f"graft.experts = {k}", rule, f"ask for 1 to {len(self.cross)}")

    def add_products(self, target: Tensor, outputs: Tensor) -> None:
        """Add tokens' inner products.

        Args:
            target: F, ``[T, D]``.
            outputs: Every expert's own output, ``[N, T, D]``.
        """
        stacked = torch.cat([outputs, target[None]]).double().flatten(1)
        products = (stacked @ stacked.T).cpu()
        self.gram += products[:-1, :-1]
        self.cross += products[:-1, -1]
        self.energy += products[-1, -1].item()
        self.tokens += len(target)

    def add_routing(self, index: Tensor, weight: Tensor) -> None:
        """Add what the router did with tokens: ``index`` and ``weight``, both ``[T, K]``."""
        # On the CPU, because CUDA adds up a bin in no fixed order.
        chosen, given, N = index.flatten().cpu(), weight.flatten().double().cpu(), len(self.cross)
        self.counts += torch.bincount(chosen, minlength=N)[:N]
        self.weights += torch.bincount(chosen, given, minlength=N)[:N]


@dataclass
class _Probe:
    """Scores one batch's chosen positions while the experts are watched."""

    scores: dict[str, LayerScores] = field(default_factory=dict)
    positions: Tensor | None = None

    def note(self, experts: LayerExperts) -> Note:
        layer = self.scores[experts.name] = LayerScores.empty(experts.name, experts.num_experts)
        chunk = max(1, STACK // (experts.num_experts * experts.width))

        def score(*call: Tensor) -> None:
            hidden, index, weight, target = (t[self.positions] for t in call)
            layer.add_routing(index, weight)
            for tokens, part in zip(torch.split(hidden, chunk), torch.split(target, chunk), strict=True):
                layer.add_products(part, _outputs(experts, tokens))

        return score


def _outputs(experts: LayerExperts, hidden: Tensor) -> Tensor:
    """Return every expert's output ``[N, T, D]``, whatever the router says."""
    return torch.stack([experts.run(hidden, experts.expert(i)) for i in range(experts.num_experts)])


@torch.no_grad()
def reconstruction_scores(
    forward: Callable[[Batch], object],
    experts: Sequence[LayerExperts],
    batches: Iterable[Batch],
    *,
    max_tokens: int,
    generator: Generator,
) -> list[LayerScores]:
    """Score every expert of every layer in one pass over the calibration batches.

    Args:
        forward: Runs the base on one batch; called once per batch.
        experts: The modules to score.
        batches: Dicts with at least ``attention_mask [B, S]``; padding is never scored.
        max_tokens: Token budget per layer, spread evenly over the batches.
        generator: Stream that picks the tokens where there are more than the budget.

    Raises:
        GraftError: There is no calibration token.
    """
    batches = list(batches)
    total = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if not total:
        raise GraftError("calibration data", "it holds no token", "give the client at least one row")
    probe = _Probe()
    handles = [handle for e in experts for handle in e.watch(probe.note(e))]
    try:
        for batch in batches:
            probe.positions = _sample(batch["attention_mask"], max_tokens / total, generator)
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(probe.scores.values())


def _sample(mask: Tensor, rate: float, generator: Generator) -> Tensor:
    """Return sorted flat positions of unmasked tokens, a random share ``rate`` of them (at most all)."""
    positions = mask.reshape(-1).nonzero().squeeze(-1)
    count = min(len(positions), max(1, round(rate * len(positions))))
    order = torch.randperm(len(positions), generator=generator)[:count].to(positions.device)
    return positions[order].sort().values
