"""Paired comparison of two methods a and b over seeds, clients and test rows.

Shapes: B resamples, R rows of one client, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from flexperts.errors import DataError

Floats = NDArray[np.float64]
_CELLS = 1_000_000
"""Most row draws in memory at the same time."""


@dataclass(frozen=True)
class Paired:
    """Two methods' scores on the same test rows, in one seed.

    Args:
        differences: Client -> ``[R]`` score of method a minus score of method b, row by row.
        weights: Client -> ``[R]`` positive weight of each row: 1 for ROUGE-L, response tokens for NLL.
    """

    differences: Mapping[str, Floats]
    weights: Mapping[str, Floats]

    def __post_init__(self) -> None:
        clients = sorted(self.differences)
        if not clients or clients != sorted(self.weights):
            raise _refused(
                f"differences of {clients}, weights of {sorted(self.weights)}", "both need the same clients"
            )
        for client in clients:
            _check_rows(client, self.differences[client], self.weights[client])


@dataclass(frozen=True)
class Difference:
    """Method a minus method b, in the score's unit.

    Args:
        difference: Macro mean: over seeds, of the mean (or another statistic) over clients, of the weighted mean
            over rows.
        low: Lower end of the confidence interval.
        high: Upper end.
        p: Two-sided p-value of no difference; below 1 - confidence where the interval excludes 0.
    """

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    seeds: Sequence[Paired],
    *,
    same_rows: bool,
    resamples: int = 10_000,
    confidence: float = 0.95,
    generator: np.random.Generator,
    over: Callable[[Floats], Floats] | None = None,
) -> Difference:
    """Return the macro difference with interval and p-value from a bootstrap of rows and seeds.

    Every resample is the sum of two parts that vary independently. *Rows*: each client's test rows are drawn with
    replacement (percentile bootstrap). *Seeds*: the mean over S seeds is shifted by Student's t with S - 1 degrees
    of freedom times its standard error. Drawing S seeds with replacement instead would give (S - 1) / S of their
    variance and no tails, and therefore intervals that are too narrow.

    The interval covers other training seeds and other test rows of *these* clients. Clients are fixed; it does not
    apply to other clients. With one seed, it covers rows only. Weaknesses: variation that rows and seeds have in
    common is counted in both parts, so the interval is too wide where neither matters alone (coverage up to 99 %);
    with two or three seeds it is wide because so few seeds give little information (t is 12.7 and 4.3); with fewer
    than about 20 rows, percentile intervals are somewhat too narrow.

    Args:
        seeds: One element per training seed; all have the same clients.
        same_rows: Whether row i of a client is the same test row in every seed: then it is drawn for all seeds
            together. Otherwise rows are drawn separately for every seed.
        resamples: B, which also bounds p from below by 2 / (B + 1).
        confidence: Coverage probability of the interval, in (0, 1).
        generator: Source of the draws; the order of clients does not matter.
        over: Another statistic than the mean over the C clients of a seed: from ``[C, ...]`` to ``[...]``.
    """
    _check_seeds(seeds, same_rows=same_rows)
    clients = sorted(seeds[0].differences)
    drawn = [_resampled(seeds, c, same_rows, resamples, generator) for c in clients]
    if over is None:
        values = np.mean([each.mean(axis=1) for each in drawn], axis=0)
    else:
        values = over(np.stack(drawn)).mean(axis=1)
    means = _seed_means(seeds, over or _mean)
    if len(seeds) > 1:
        error = means.std(ddof=1) / np.sqrt(len(seeds))
        values = values + error * generator.standard_t(len(seeds) - 1, size=resamples)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(means.mean()), float(low), float(high), _p_value(values))


def adjust(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the false discovery rate over all of them (Benjamini and Hochberg, 1995)."""
    return [float(p) for p in false_discovery_control(p_values)] if len(p_values) else []


def _mean(by_client: Floats) -> Floats:
    return np.asarray(by_client.mean(axis=0))


def _seed_means(seeds: Sequence[Paired], over: Callable[[Floats], Floats]) -> Floats:
    """Return every seed's statistic over clients ``[S]``; the clients are in the order of their names."""
    clients = sorted(seeds[0].differences)
    by_client = ([np.average(s.differences[c], weights=s.weights[c]) for c in clients] for s in seeds)
    return np.array([over(np.array(means)) for means in by_client])


def _resampled(seeds: Sequence[Paired], client: str, same_rows: bool, count: int, generator: Any) -> Floats:
    """Return ``[B, S]`` weighted means of one client over drawn rows."""
    groups = [list(seeds)] if same_rows else [[seed] for seed in seeds]
    means = []
    for group in groups:
        values = np.stack([seed.differences[client] for seed in group], axis=1)
        weights = np.stack([seed.weights[client] for seed in group], axis=1)
        means.append(_draw(values, weights, count, generator))
    return np.concatenate(means, axis=1)


def _draw(values: Floats, weights: Floats, count: int, generator: np.random.Generator) -> Floats:
    """Return ``[B, S]`` weighted means of ``[R, S]`` values over rows drawn with replacement."""
    step = max(1, _CELLS // len(values))
    chunks = []
    for start in range(0, count, step):
        times = _times_drawn(len(values), min(step, count - start), generator)
        chunks.append((times @ (values * weights)) / (times @ weights))
    return np.concatenate(chunks)


def _times_drawn(rows: int, count: int, generator: np.random.Generator) -> Floats:
    """Return how often each row is drawn when R rows are drawn from R: ``[B, R]``."""
    draws = generator.integers(rows, size=(count, rows)) + rows * np.arange(count)[:, None]
    return np.bincount(draws.ravel(), minlength=count * rows).reshape(count, rows).astype(float)


def _p_value(values: Floats) -> float:
    """Return twice the smaller share of resamples on one side of zero; adding 1 keeps p above zero."""
    smaller = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (len(values) + 1))


def _check_rows(client: str, differences: Floats, weights: Floats) -> None:
    shapes = np.shape(differences), np.shape(weights)
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
        raise _refused(f"{client}: differences {shapes[0]}, weights {shapes[1]}", "both need one number per row")
    if not (np.isfinite(differences).all() and np.isfinite(weights).all() and np.min(weights) > 0):
        raise _refused(f"{client}: scores or weights", "scores must be finite, and weights finite and above 0")


def _check_seeds(seeds: Sequence[Paired], same_rows: bool = False) -> None:
    if not seeds:
        raise _refused("no seed", "a comparison needs at least one seed that both methods finished")
    for seed in seeds[1:]:
        if seed.differences.keys() != seeds[0].differences.keys():
            found = f"clients {sorted(seed.differences)} and {sorted(seeds[0].differences)}"
            raise _refused(found, "every seed needs the same clients")
    for client in seeds[0].differences if same_rows else ():
        counts = [len(seed.differences[client]) for seed in seeds]
        if len(set(counts)) > 1:
            raise _refused(f"{client}: {counts} rows", "with same_rows, every seed must have the same rows")


def _refused(value: str, rule: str) -> DataError:
    return DataError(value, rule, "compare runs of one recipe on the same test rows")
