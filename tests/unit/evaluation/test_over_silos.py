"""Measures over silos and seeds against sorting, counting pairs, scipy, and closed forms."""

from __future__ import annotations

from itertools import product
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from flexperts.studies.over_silos import (
    interquartile_mean,
    probability_of_improvement,
    share_of,
    spread_over,
    stratified_interval,
)

SEEDS, SILOS = 3, 19


def drawn(number: int, seeds: int = SEEDS, silos: int = SILOS) -> np.ndarray:
    """Scores of silos that are far apart, with a few equal ones."""
    draws = np.random.default_rng(number)
    return np.round(draws.normal(size=(seeds, silos)) * 0.2 + np.linspace(0, 3, silos), 1)


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end_of_all_seeds_and_silos():
    """Of 3 x 19 = 57 scores, 14 at each end; an outlier does not move it, as it moves the mean."""
    scores = drawn(0)
    expected = fmean(sorted(scores.ravel())[14:-14])
    assert interquartile_mean(scores[None]) == pytest.approx([expected], rel=1e-12)
    scores[0, -1] = 1e6
    assert interquartile_mean(scores[None]) == pytest.approx([expected], rel=1e-12)
    assert interquartile_mean(np.stack([scores, scores + 1])) == pytest.approx([expected, expected + 1])


def test_the_probability_of_improvement_counts_pairs_of_seeds_within_each_silo():
    ours, theirs = drawn(1), drawn(2, seeds=5)
    by_hand = [fmean((a > b) + (a == b) / 2 for a, b in product(ours[:, c], theirs[:, c])) for c in range(SILOS)]
    mann_whitney = [stats.mannwhitneyu(ours[:, c], theirs[:, c]).statistic / 15 for c in range(SILOS)]
    assert by_hand == pytest.approx(mann_whitney)
    found = probability_of_improvement(ours[None], theirs[None])
    assert found == pytest.approx([fmean(by_hand)], rel=1e-12)
    assert probability_of_improvement(theirs[None], ours[None]) == pytest.approx(1 - found)
    assert probability_of_improvement(ours[None], ours[None]) == pytest.approx([0.5])


def test_each_silo_has_its_own_draw_of_seeds():
    """scipy's bootstrap of independent samples, one for each silo, or for each silo and entry."""
    ours, theirs = drawn(3), drawn(4)
    manner = {"confidence_level": 0.9, "n_resamples": 20_000, "method": "percentile"}

    def found(measure, *scores):
        return stratified_interval(measure, scores, 20_000, 0.9, np.random.default_rng(0))

    def of_one(*silos, axis):
        return interquartile_mean(np.stack(silos, axis=-1))

    samples = [ours[:, c] for c in range(SILOS)]
    expected = stats.bootstrap(samples, of_one, rng=np.random.default_rng(1), **manner).confidence_interval
    assert found(interquartile_mean, ours) == pytest.approx(tuple(expected), abs=0.01)

    def of_two(*silos, axis):
        return probability_of_improvement(np.stack(silos[:SILOS], axis=-1), np.stack(silos[SILOS:], axis=-1))

    samples += [theirs[:, c] for c in range(SILOS)]
    expected = stats.bootstrap(samples, of_two, rng=np.random.default_rng(1), **manner).confidence_interval
    assert found(probability_of_improvement, ours, theirs) == pytest.approx(tuple(expected), abs=0.01)


def test_one_seed_has_no_interval():
    generator = np.random.default_rng(0)
    assert stratified_interval(interquartile_mean, [drawn(0, seeds=1)], 100, 0.95, generator) == (None, None)


@pytest.mark.parametrize(("is_lower_better", "worst"), [(True, ["s18", "s17"]), (False, ["s0", "s1"])])
def test_the_worst_tenth_of_nineteen_silos_is_two(is_lower_better, worst):
    silos = {f"s{i}": i / 7 for i in range(19)}
    found = spread_over(silos, is_lower_better)
    assert found["worst"] == {"client": worst[0], "value": silos[worst[0]]}
    assert found["worst_tenth"] == pytest.approx(fmean(silos[name] for name in worst))
    assert found["std"] == pytest.approx(stdev(silos.values()))
    assert spread_over({"one": 2.0}, is_lower_better) == {
        "std": None, "worst": {"client": "one", "value": 2.0}, "worst_tenth": 2.0,
    }  # fmt: skip


def test_the_share_of_harmed_silos_has_wilsons_interval():
    """By its closed form; it stays inside 0 and 1, and has a width where no silo is harmed."""
    found = share_of(np.arange(19) < 3, 0.95)
    z, n, p = stats.norm.ppf(0.975), 19, 3 / 19
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found["count"], found["silos"], found["value"]) == (3, 19, p)
    ends = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert [found["low"], found["high"]] == pytest.approx(ends)
    none = share_of(np.zeros(19, dtype=bool), 0.95)
    assert none["low"] == pytest.approx(0, abs=1e-12)
    assert 0.1 < none["high"] < 0.2
