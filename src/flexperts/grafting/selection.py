"""Choosing the pretrained expert that best reproduces a layer's routed output on a client's own tokens.

    s* = argmin_s  sum_x || F(x) - E_s(x) ||^2        F(x) = sum_{j in TopK} g_j(x) E_j(x)

With one expert kept, its re-normalised router weight is 1. All layers are scored in ONE forward pass: hooks add to
per-expert float64 sums and store nothing. Shapes: T tokens, D width, N experts.
Source: FLEx (arXiv 2506.00965), after the layer-wise criterion of Lu et al., ACL 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from flexperts.errors import GraftError
from flexperts.moe.experts import FusedExperts

Batch = Mapping[str, Tensor]


@dataclass
class LayerScores:
    """Reconstruction sums of one experts module over the calibration tokens.

    Args:
        name: Experts module name.
        errors: ``[N]`` float64, sum over tokens of ||F - E_s||^2.
        energy: Sum over tokens of ||F||^2.
        tokens: Calibration tokens that were scored.
    """

    name: str
    errors: Tensor
    energy: float = 0.0
    tokens: int = 0

    @property
    def relative(self) -> Tensor:
        """``[N]`` errors over the routed output's energy: 1 is as bad as predicting zero."""
        return self.errors / max(self.energy, 1e-30)

    def best(self, k: int) -> tuple[int, ...]:
        """Return the k experts with the smallest error, best first."""
        if not 1 <= k <= len(self.errors):
            raise GraftError(f"graft.experts = {k}", f"{self.name} has {len(self.errors)} experts", "ask for fewer")
        return tuple(int(i) for i in self.errors.argsort(stable=True)[:k])


@dataclass
class _Probe:
    """Scores one batch's chosen positions inside the experts modules' forward hooks."""

    scores: dict[str, LayerScores] = field(default_factory=dict)
    positions: Tensor | None = None

    def hook(self, experts: FusedExperts) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        self.scores[experts.name] = LayerScores(experts.name, torch.zeros(experts.num_experts, dtype=torch.float64))

        def score(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            hidden = args[0].reshape(-1, args[0].shape[-1])[self.positions]
            target = output.reshape(-1, output.shape[-1])[self.positions].float()
            self._add(experts, hidden, target)

        return score

    def _add(self, experts: FusedExperts, hidden: Tensor, target: Tensor) -> None:
        layer = self.scores[experts.name]
        layer.tokens += len(hidden)
        layer.energy += target.double().square().sum().item()
        for index in range(experts.num_experts):
            output = experts.run(hidden, experts.expert(index)).float()
            layer.errors[index] += (target - output).square().sum(dtype=torch.float64).cpu()


@torch.no_grad()
def reconstruction_scores(
    forward: Callable[[Batch], object],
    experts: Sequence[FusedExperts],
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
    handles = [e.module.register_forward_hook(probe.hook(e)) for e in experts]
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
