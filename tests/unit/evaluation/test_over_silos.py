"""Measures over silos and seeds against sorting, counting pairs, scipy, and closed forms."""

from __future__ import annotations

from itertools import product
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from flexperts.studies.over_silos import (
    SiloScores,
    interquartile_mean,
    joint_interval,
    probability_of_improvement,
    share_of,
    spread_over,
)

SEEDS, SILOS = 3, 19


def drawn(number: int, seeds: int = SEEDS, silos: int = SILOS) -> np.ndarray:
    """Scores of silos that are far apart, with a few equal ones."""
    draws = np.random.default_rng(number)
    return np.round(draws.normal(size=(seeds, silos)) * 0.2 + np.linspace(0, 3, silos), 1)


def of_rows(rows: np.ndarray) -> SiloScores:
    """Scores of rows ``[S, C, R]``, each of the same weight."""
    names = [f"s{i}" for i in range(rows.shape[1])]
    return SiloScores(names, rows.mean(axis=2), [(its.T, np.ones(its.T.shape)) for its in rows.swapaxes(0, 1)])


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
    """scipy's bootstrap of independent samples, one for each silo (and entry); all rows are equal."""
    ours, theirs = drawn(3), drawn(4)
    manner = {"confidence_level": 0.9, "n_resamples": 20_000, "method": "percentile"}

    def found(measure, *scores):
        equal = [of_rows(np.repeat(its[:, :, None], 4, axis=2)) for its in scores]
        return joint_interval(measure, equal, 20_000, 0.9, np.random.default_rng(0))

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


def test_with_one_seed_it_covers_the_rows():
    """One silo: its score's interval is scipy's percentile bootstrap of a weighted mean over rows."""
    draws = np.random.default_rng(6)
    rows, weights = draws.exponential(size=(30, 1)), draws.integers(1, 40, size=(30, 1)).astype(float)
    scores = SiloScores(["s"], np.average(rows, axis=0, weights=weights)[None], [(rows, weights)])
    theirs = stats.bootstrap(
        ((rows * weights)[:, 0], weights[:, 0]),
        lambda total, weight, axis=-1: total.sum(axis) / weight.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = joint_interval(interquartile_mean, [scores], 20_000, 0.95, np.random.default_rng(1))
    assert ours == pytest.approx(tuple(theirs), abs=0.02)


def test_rows_are_the_same_rows_of_both_entries_and_all_seeds():
    """Rows differ by 5, entries by 0.01 in each row: no draw of rows makes the other entry better."""
    rows = np.random.default_rng(7).normal(size=(1, 4, 20)) * 5 + np.zeros((2, 1, 1))
    pair = of_rows(rows + 0.01), of_rows(rows)
    assert joint_interval(probability_of_improvement, pair, 500, 0.95, np.random.default_rng(0)) == (1, 1)
    low, high = joint_interval(interquartile_mean, pair[:1], 500, 0.95, np.random.default_rng(0))
    assert high - low > 1


def test_equal_entries_are_seldom_told_apart():
    """Sixteen silos, three seeds, 60 rows that are as hard for both: 95 % of intervals should hold 0.5."""
    draws, held = np.random.default_rng(8), 0
    for _ in range(40):
        difficulty = draws.normal(size=(1, 16, 1)) + draws.normal(size=(1, 16, 60))
        entries = [
            difficulty + 0.3 * draws.normal(size=(1, 16, 60)) + 0.2 * draws.normal(size=(3, 16, 60)) for _ in "ab"
        ]
        low, high = joint_interval(probability_of_improvement, [*map(of_rows, entries)], 200, 0.95, draws)
        held += low <= 0.5 <= high
    assert held >= 36


@pytest.mark.parametrize("rows", [None, [(np.ones((1, 2)), np.ones((1, 2)))] * SILOS])
def test_without_rows_to_draw_there_is_no_interval(rows):
    scores = SiloScores([f"s{i}" for i in range(SILOS)], drawn(0, seeds=2), rows)
    assert joint_interval(interquartile_mean, [scores], 100, 0.95, np.random.default_rng(0)) == (None, None)


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
