"""Measures over silos and seeds that no mean shows: robust ones, and how far the silos are apart.

The interquartile mean, the probability of improvement and their stratified bootstrap are those of Agarwal et al.,
"Deep reinforcement learning at the edge of the statistical precipice" (NeurIPS 2021), and of their library rliable,
with a silo as a task and a seed as a run. rliable is not used: it needs arch, statsmodels and seaborn.

Shapes: S seeds, C silos (clients), B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, trim_mean

from flexperts.evaluation.scores import REWARDS, SCORES
from flexperts.seeding import derive_seed
from flexperts.studies.contrast import is_comparable
from flexperts.studies.finished import Finished
from flexperts.studies.statistics import Floats, worst_tenth

LOWER_IS_BETTER = {"nll"}
_CELLS = 1_000_000
"""Most drawn scores in memory at the same time."""


def over_silos(
    finished: Sequence[Finished], reference: Finished, confidence: float, resamples: int
) -> dict[str, dict[str, Any]]:
    """Return, by entry and score, measures of the entry's own state over the clients' scores on their own rows.

    Args:
        finished: The entries.
        reference: The entry with which the others are compared, over the seeds that both have finished.
        confidence, resamples: As for ``collect``.

    Returns:
        Entry -> score -> ``iqm`` (value, low, high), ``std``, ``worst`` (client, value) and ``worst_tenth`` over
        silos, ``improvement`` and ``harmed`` against the reference (None for the reference itself, and for NLL over
        other tokens). A score that is not finite in some silo and seed is left out. Intervals have no ends (None)
        where there is one seed.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in finished:
        other = None if entry is reference or entry.clients != reference.clients else reference
        by_kind = {kind: _measures(entry, other, kind, confidence, resamples) for kind in (*SCORES, *REWARDS)}
        found[entry.name] = {kind: its for kind, its in by_kind.items() if its is not None}
    return found


def _measures(
    entry: Finished, reference: Finished | None, kind: str, confidence: float, resamples: int
) -> dict[str, Any] | None:
    ours, is_lower_better = _scores(entry, kind), kind in LOWER_IS_BETTER
    if not np.isfinite(ours).all():
        return None
    generator = np.random.default_rng(derive_seed(0, "bootstrap", "silos", kind, entry.name))

    def bounded(measure: Callable[..., Any], *scores: Floats) -> dict[str, float | None]:
        ends = stratified_interval(measure, scores, resamples, confidence, generator)
        return {"value": float(measure(*(its[None] for its in scores))[0]), "low": ends[0], "high": ends[1]}

    spread = spread_over(dict(zip(entry.clients, ours.mean(axis=0), strict=True)), is_lower_better)
    made = {"iqm": bounded(interquartile_mean, ours), **spread, "improvement": None, "harmed": None}
    pair = reference and is_comparable(entry, reference, kind) and _paired(entry, reference, kind)
    if pair:
        ours, theirs = (-its if is_lower_better else its for its in pair)  # higher is better from here on
        made["improvement"] = bounded(probability_of_improvement, ours, theirs)
        made["harmed"] = share_of(ours.mean(axis=0) < theirs.mean(axis=0), confidence)
    return made


def _scores(entry: Finished, kind: str, seeds: Sequence[int] | None = None) -> Floats:
    """Return the scores of an entry's own state, ``[S, C]``; not-a-number where there is none."""
    wanted = list(entry.runs) if seeds is None else seeds
    own = entry.scored_states[-1]
    clients = [[entry.scored[s][c] for c in entry.clients] for s in wanted]
    return np.array([[its.get(kind, {}).get(own) for its in seed] for seed in clients], dtype=float)


def _paired(entry: Finished, reference: Finished, kind: str) -> tuple[Floats, Floats] | None:
    """Return both entries' scores over the seeds that they have in common; None if there is none, or a gap."""
    seeds = [seed for seed in entry.runs if seed in reference.runs]
    pair = _scores(entry, kind, seeds), _scores(reference, kind, seeds)
    return pair if seeds and all(np.isfinite(its).all() for its in pair) else None


def interquartile_mean(scores: Floats) -> Floats:
    """Return the mean of the middle half of ``[B, S, C]`` scores, over seeds and silos together: ``[B]``."""
    return np.asarray(trim_mean(scores.reshape(len(scores), -1), 0.25, axis=1))


def probability_of_improvement(ours: Floats, theirs: Floats) -> Floats:
    """Return P(X > Y) of ``[B, S, C]`` and ``[B, S', C]`` scores, higher being better: ``[B]``.

    In a silo it is the share of all pairs of a seed of X and a seed of Y in which X is better, an equal pair
    counting half (the Mann-Whitney statistic); over silos, the plain mean.
    """
    mine, other = ours[:, :, None], theirs[:, None]
    return np.asarray(((mine > other) + 0.5 * (mine == other)).mean(axis=(1, 2, 3)))


def stratified_interval(
    measure: Callable[..., Any],
    scores: Sequence[Floats],
    resamples: int,
    confidence: float,
    generator: np.random.Generator,
) -> tuple[float, float] | tuple[None, None]:
    """Return a percentile interval of a measure: in every silo and every array, seeds are drawn with replacement.

    Args:
        measure: From one ``[B, S, C]`` array for each of ``scores`` to ``[B]`` values.
        scores: Arrays of ``[S, C]``; each is drawn by itself.
        resamples, confidence, generator: As for ``paired_bootstrap``.
    """
    if any(len(its) < 2 for its in scores):
        return None, None
    step = max(1, _CELLS // math.prod([scores[0].size, *(len(its) for its in scores[1:])]))
    values = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = [generator.integers(len(its), size=(count, *its.shape)) for its in scores]
        drawn = [np.take_along_axis(its[None], i, axis=1) for its, i in zip(scores, rows, strict=True)]
        values.append(measure(*drawn))
    low, high = np.quantile(np.concatenate(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def spread_over(silos: Mapping[str, float], is_lower_better: bool) -> dict[str, Any]:
    """Return how far silos are apart.

    Args:
        silos: Client -> score, mean over seeds.
        is_lower_better: Whether the highest score is the worst.

    Returns:
        ``std`` (n - 1; None for one silo), ``worst`` (client and value), and ``worst_tenth``: the mean of the worst
        tenth of the silos, rounded up to whole silos.
    """
    worst = (max if is_lower_better else min)(silos, key=lambda client: silos[client])
    values, sign = np.array(list(silos.values())), 1 if is_lower_better else -1
    return {
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "worst": {"client": worst, "value": float(silos[worst])},
        "worst_tenth": sign * float(worst_tenth(sign * values)),
    }


def share_of(harmed: NDArray[np.bool_], confidence: float) -> dict[str, Any]:
    """Return how many of the silos are harmed, and Wilson's interval of the share.

    This interval takes the silos as drawn from many, unlike the bootstrap's, which are for these silos.
    """
    test = binomtest(int(harmed.sum()), len(harmed))
    ends = test.proportion_ci(confidence, method="wilson")
    return {
        "count": test.k,
        "silos": test.n,
        "value": test.k / test.n,
        "low": float(ends.low),
        "high": float(ends.high),
    }
