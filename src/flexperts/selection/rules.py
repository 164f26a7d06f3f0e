"""Rules that choose the experts for a client's grafts, from the sums that ``selection`` collects.

Two rules compare subsets S of experts by how well constant coefficients c can reproduce the routed output F:

    err(S) = min_c  sum_x || F(x) - sum_{s in S} c_s E_s(x) ||^2  =  energy - b_S' G_SS^+ b_S

with b the cross and G the gram sums. For |S| > 1 the paper instead keeps the experts in S and takes a new softmax
of their router logits. This is not done here for two reasons: transformers calls an experts module with the top-K
weights and not with all logits; and each personal expert has an independent sigmoid, not a share of a softmax, so
constants, which the gates then refine per token, are the natural measure. For |S| = 1 the paper's weight is 1: that
is ``reconstruction``; ``scaled`` has a free weight.

Shapes: N experts, M subsets, k experts chosen. Source: FLEx (arXiv 2506.00965); the other rules are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

import torch
from torch import Generator, Tensor

from flexperts.errors import ConfigError, GraftError, did_you_mean
from flexperts.selection.selection import LayerScores

Layer = TypeVar("Layer")
Rule = Callable[[LayerScores, int, Generator], tuple[int, ...]]
"""(a layer's sums, k, random stream) -> k different experts, best first."""
_SUBSETS = 20_000
# Eigenvalues below this share of the largest count as zero: a gram matrix squares every rounding error.
_COLLINEAR = 1e-10


def reconstruction(layer: LayerScores, k: int, _generator: Generator) -> tuple[int, ...]:
    """Pick the k smallest ||F - E_s||^2: the paper's rule for one expert."""
    return layer.best(k)


def scaled(layer: LayerScores, k: int, _generator: Generator) -> tuple[int, ...]:
    """Pick the k smallest min_a ||F - a E_s||^2: an output's direction counts, its length does not."""
    return _smallest(_singles(layer), k)


def frequency(layer: LayerScores, k: int, _generator: Generator) -> tuple[int, ...]:
    """Pick the k experts to which most tokens are routed."""
    return _smallest(-layer.counts, k)


def router_weight(layer: LayerScores, k: int, _generator: Generator) -> tuple[int, ...]:
    """Pick the k experts with the largest sum of router weights."""
    return _smallest(-layer.weights, k)


def uniform(layer: LayerScores, k: int, generator: Generator) -> tuple[int, ...]:
    """Pick k experts at random, each subset as likely as any other."""
    return tuple(torch.randperm(len(layer.cross), generator=generator)[:k].tolist())


def greedy(layer: LayerScores, k: int, _generator: Generator) -> tuple[int, ...]:
    """Start from no experts and add, k times, the expert that lowers err(S) most."""
    chosen: tuple[int, ...] = ()
    for _ in range(k):
        wider = [(*chosen, s) for s in range(len(layer.cross)) if s not in chosen]
        chosen = wider[int(_errors(layer, wider).argmin())]
    return chosen


def exhaustive(layer: LayerScores, k: int, _generator: Generator) -> tuple[int, ...]:
    """Pick the subset with the smallest err(S) of all, sorted by the experts' single errors."""
    N = len(layer.cross)
    if (count := math.comb(N, k)) > _SUBSETS:
        value = f"graft.selection = 'exhaustive' with graft.experts = {k}"
        rule = f"{layer.name} has {count} subsets of {N} experts, and {_SUBSETS} is the limit"
        raise GraftError(value, rule, "use graft.selection = 'greedy', or lower graft.experts")
    subsets = list(combinations(range(N), k))
    best, alone = subsets[int(_errors(layer, subsets).argmin())], _singles(layer)
    return tuple(sorted(best, key=lambda s: alone[s].item()))


RULES: dict[str, Rule] = {
    "reconstruction": reconstruction,
    "scaled": scaled,
    "frequency": frequency,
    "router_weight": router_weight,
    "random": uniform,
    "greedy": greedy,
    "exhaustive": exhaustive,
}
"""Name in recipes -> rule."""


def select(rule: str, layer: LayerScores, k: int, generator: Generator) -> tuple[int, ...]:
    """Return k different experts of a layer, best first; equal ones are in the order of their numbers.

    Args:
        rule: A key of ``RULES``.
        layer: The layer's sums.
        k: Number of experts.
        generator: Stream of the random rule.
    """
    if rule not in RULES:
        hint = did_you_mean(rule, RULES, "choose one of them")
        raise ConfigError(f"graft.selection = {rule!r}", f"rules are {', '.join(RULES)}", hint)
    layer.check_count(k)
    return RULES[rule](layer, k, generator)


def coefficients(layer: LayerScores, indices: Sequence[int]) -> tuple[float, ...]:
    """Return the c with which the chosen experts reproduce F best, in the order of ``indices``.

    Experts with collinear outputs share their coefficient; an expert whose output is always zero gets 0.
    """
    _check(layer, indices)
    return tuple(_solve(layer, torch.tensor([list(indices)]))[0].tolist())


def subset_error(layer: LayerScores, indices: Sequence[int]) -> float:
    """Return err(S), in the units of ``layer.energy``."""
    _check(layer, indices)
    return _errors(layer, [indices]).item()


def pick_layers(layers: Sequence[Layer], wanted: Sequence[int]) -> list[Layer]:
    """Return the wanted layers, each once, in the model's order.

    Args:
        layers: One item per MoE layer, in the model's order.
        wanted: Positions in ``layers`` from 0, negative from the end; empty means all.
    """
    count = len(layers)
    for position in wanted:
        if not -count <= position < count:
            rule = f"the base has {count} MoE layers"
            raise GraftError(f"graft.layers names {position}", rule, f"use numbers from {-count} to {count - 1}")
    kept = {position % count for position in wanted} if wanted else range(count)
    return [layer for position, layer in enumerate(layers) if position in kept]


def _smallest(scores: Tensor, k: int) -> tuple[int, ...]:
    return tuple(int(i) for i in scores.argsort(stable=True)[:k])


def _singles(layer: LayerScores) -> Tensor:
    """Return err({s}) of every expert, ``[N]``."""
    return _errors(layer, [(s,) for s in range(len(layer.cross))])


def _errors(layer: LayerScores, subsets: Sequence[Sequence[int]]) -> Tensor:
    """Return err(S) of M subsets of one size, ``[M]``."""
    index = torch.tensor([list(subset) for subset in subsets])
    return (layer.energy - (layer.cross[index] * _solve(layer, index)).sum(-1)).clamp_min(0)


def _solve(layer: LayerScores, index: Tensor) -> Tensor:
    """Return the coefficients ``[M, k]`` of the subsets ``index [M, k]``.

    Outputs are scaled to length 1 first, so that the cutoff removes collinear experts, but not small ones.
    """
    if index.shape[1] > 1 and not layer.pairs:
        value = f"{layer.name}: a subset of {index.shape[1]} experts"
        raise GraftError(value, "they were scored one by one", "score them with pairs = True")
    length = layer.gram.diagonal().sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)[index]
    gram = layer.gram[index.unsqueeze(-1), index.unsqueeze(-2)] * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    pinv = torch.linalg.pinv(gram, rtol=_COLLINEAR, hermitian=True)
    solution: Tensor = pinv @ (layer.cross[index] * inverse).unsqueeze(-1)
    return solution.squeeze(-1) * inverse


def _check(layer: LayerScores, indices: Sequence[int]) -> None:
    N = len(layer.cross)
    if not indices or len(set(indices)) != len(indices) or not set(indices) <= set(range(N)):
        value = f"{layer.name}: experts {list(indices)}"
        raise GraftError(value, f"they must be different numbers from 0 to {N - 1}", "select again on this base")
