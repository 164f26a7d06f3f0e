"""Measures over silos and seeds that no mean shows: robust ones, and how far the silos are apart.

The interquartile mean and the probability of improvement are those of Agarwal et al., "Deep reinforcement learning
at the edge of the statistical precipice" (NeurIPS 2021), and of their library rliable, with a silo as a task and a
seed as a run. rliable is not used: its intervals cover no other test rows; it needs arch, statsmodels and seaborn.

Shapes: S seeds, C silos, R rows of one silo, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, trim_mean

from flexperts.evaluation.scores import REWARDS, SCORES
from flexperts.seeding import derive_seed
from flexperts.studies.contrast import columns_of, have_same_rows, is_comparable
from flexperts.studies.finished import Finished
from flexperts.studies.statistics import Floats, times_drawn

_CELLS = 1_000_000
"""Most drawn rows in memory at the same time."""
_MOST = 10_000
"""Most resamples: these intervals have no p-value, which would need more."""


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
        where the scores of the rows are not known.
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
    ours, is_lower_better = _scores(entry, kind, entry.runs), kind == "nll"
    if not np.isfinite(ours.means).all():
        return None
    generator = np.random.default_rng(derive_seed(0, "bootstrap", "silos", kind, entry.name))

    def bounded(measure: Callable[..., Any], *scores: SiloScores) -> dict[str, float | None]:
        ends = joint_interval(measure, scores, min(resamples, _MOST), confidence, generator)
        return {"value": float(measure(*(its.means[None] for its in scores))[0]), "low": ends[0], "high": ends[1]}

    spread = spread_over(dict(zip(ours.silos, ours.means.mean(axis=0), strict=True)), is_lower_better)
    made = {"iqm": bounded(interquartile_mean, ours), **spread, "improvement": None, "harmed": None}
    pair = reference and is_comparable(entry, reference, kind) and _paired(entry, reference, kind)
    if pair:
        sign = -1 if is_lower_better else 1
        made["improvement"] = bounded(lambda a, b: probability_of_improvement(sign * a, sign * b), *pair)
        mine, other = (sign * its.means.mean(axis=0) for its in pair)
        made["harmed"] = share_of(mine < other, confidence)
    return made


@dataclass(frozen=True)
class SiloScores:
    """The scores of an entry's own state.

    Args:
        silos: Names of the C silos. Where seeds draw other rows for a client, each seed's is a silo of its own.
        means: ``[S, C]``; not-a-number where there is none.
        rows: For each silo the scores and the weights of its rows, ``[R, S]`` each; None where they are not known.
    """

    silos: Sequence[str]
    means: Floats
    rows: Sequence[tuple[Floats, Floats]] | None = None


def _scores(entry: Finished, kind: str, seeds: Iterable[int]) -> SiloScores:
    own, seeds = entry.scored_states[-1], list(seeds)
    predictions = {seed: entry.predictions[seed] for seed in seeds}
    apart = len(seeds) > 1 and not have_same_rows(predictions.values())
    silos = [(c, [seed]) for seed in seeds for c in entry.clients] if apart else [(c, seeds) for c in entry.clients]
    means = [[entry.scored[seed][c].get(kind, {}).get(own) for seed in its] for c, its in silos]
    names = [f"{c}, seed {its[0]}" if apart else c for c, its in silos]
    if any(rows is None for clients in predictions.values() for rows in clients.values()):
        return SiloScores(names, np.array(means, dtype=float).T)
    rows = []
    for client, its in silos:
        columns = [columns_of(predictions[seed][client], own, kind) for seed in its]
        rows.append((np.stack([of[0] for of in columns], axis=1), np.stack([of[1] for of in columns], axis=1)))
    return SiloScores(names, np.array(means, dtype=float).T, rows)


def _paired(entry: Finished, reference: Finished, kind: str) -> tuple[SiloScores, SiloScores] | None:
    """Return both entries' scores over the seeds that they have in common; None if there is none, or a gap."""
    if not (seeds := [seed for seed in entry.runs if seed in reference.runs]):
        return None
    pair = _scores(entry, kind, seeds), _scores(reference, kind, seeds)
    return pair if all(np.isfinite(its.means).all() for its in pair) else None


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


def joint_interval(
    measure: Callable[..., Any],
    scores: Sequence[SiloScores],
    resamples: int,
    confidence: float,
    generator: np.random.Generator,
) -> tuple[float, float] | tuple[None, None]:
    """Return a percentile interval of a measure over other test rows and other seeds of the same silos.

    In every silo, rows are drawn with replacement, the same ones for all seeds and entries; then, in every silo and
    entry, seeds. (rliable draws only seeds: there each plays new episodes, here all answer the same rows.) Drawn
    rows add their noise once more, so the ends of a probability of improvement are biased towards 0.5: to no
    difference.

    Args:
        measure: From one ``[B, S, C]`` array for each of ``scores`` to ``[B]`` values.
        scores: Scores of the same silos, of equal seeds or not.
        resamples, confidence, generator: As for ``paired_bootstrap``.

    Returns:
        The ends; None where rows are not known, a silo has a single one, or one has no finite score.
    """
    tables = [its.rows for its in scores if its.rows is not None]
    if len(tables) < len(scores):
        return None, None
    values = [column for rows in tables for column, _ in rows]
    if any(len(column) < 2 or not np.isfinite(column).all() for column in values):
        return None, None
    step = max(1, _CELLS // max(map(len, values)) // len(tables[0]))
    found = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn: list[list[Floats]] = [[] for _ in tables]
        for of_silo in zip(*tables, strict=True):  # of each entry: the silo's scores and weights
            times = times_drawn(len(of_silo[0][0]), count, generator)
            for means, (column, weights) in zip(drawn, of_silo, strict=True):
                by_seed = (times @ (column * weights)) / (times @ weights)
                seeds = generator.integers(by_seed.shape[1], size=by_seed.shape)
                means.append(np.take_along_axis(by_seed, seeds, axis=1))
        found.append(measure(*(np.stack(silos, axis=2) for silos in drawn)))
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def spread_over(silos: Mapping[str, float], is_lower_better: bool) -> dict[str, Any]:
    """Return how far silos are apart.

    Args:
        silos: Silo -> score, mean over seeds.
        is_lower_better: Whether the highest score is the worst.

    Returns:
        ``std`` (n - 1; None for one silo), ``worst`` (client and value), and ``worst_tenth``: the mean of the worst
        tenth of the silos, rounded up to whole silos.
    """
    ranked = sorted(silos, key=lambda silo: silos[silo], reverse=is_lower_better)
    return {
        "std": float(np.std(list(silos.values()), ddof=1)) if len(silos) > 1 else None,
        "worst": {"client": ranked[0], "value": float(silos[ranked[0]])},
        "worst_tenth": fmean(silos[silo] for silo in ranked[: math.ceil(len(ranked) / 10)]),
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
