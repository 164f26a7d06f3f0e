"""The paired comparison against scipy, by hand and by coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from flexperts.errors import DataError
from flexperts.studies.statistics import Difference, Paired, adjust, paired_bootstrap


def paired(rows: dict[str, list[float]], weights: dict[str, list[float]] | None = None) -> Paired:
    weights = weights or {client: [1.0] * len(values) for client, values in rows.items()}
    return Paired(
        {client: np.array(values) for client, values in rows.items()},
        {client: np.array(values) for client, values in weights.items()},
    )


def bootstrap(
    seeds: list[Paired], *, same_rows: bool = True, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    generator = np.random.default_rng(seed)
    return paired_bootstrap(
        seeds, same_rows=same_rows, resamples=resamples, confidence=confidence, generator=generator
    )


def test_the_macro_mean_counts_every_client_and_seed_the_same():
    seeds = [paired({"a": [1.0, 3.0], "b": [10.0]}), paired({"a": [0.0, 0.0], "b": [4.0]})]
    assert bootstrap(seeds).difference == ((2 + 10) / 2 + (0 + 4) / 2) / 2


def test_token_weights_give_the_ratio_of_sums():
    nats, tokens = np.array([3.0, -8.0, 1.5]), np.array([10.0, 2.0, 7.0])
    one = paired({"a": list(nats / tokens)}, {"a": list(tokens)})
    assert bootstrap([one]).difference == pytest.approx(nats.sum() / tokens.sum(), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_seed_and_client_is_scipys_percentile_bootstrap(weighted):
    draws = np.random.default_rng(5)
    values = draws.exponential(size=30) - 0.8
    weights = draws.integers(1, 40, size=30).astype(float) if weighted else np.ones(30)
    theirs = stats.bootstrap(
        (values * weights, weights),
        lambda total, weight, axis=-1: total.sum(axis) / weight.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=40_000,
        rng=np.random.default_rng(0),
    )
    ours = bootstrap([paired({"a": list(values)}, {"a": list(weights)})], resamples=40_000)
    near = 0.03 * theirs.standard_error * 3  # Monte-Carlo error of a 2.5 % quantile is about 0.013 errors
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=near)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=near)


def test_the_p_value_is_near_the_sign_flip_tests():
    for shift in (0.1, 0.3):
        values = np.random.default_rng(2).normal(shift, size=80)
        flips = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
        )
        assert bootstrap([paired({"a": list(values)})]).p == pytest.approx(flips.pvalue, abs=0.02)


def test_two_rows_have_three_outcomes():
    one = paired({"a": [-1.0, 3.0]}, {"a": [1.0, 3.0]})  # -1 (1/4), (-1 + 9) / 4 = 2 (1/2), 3 (1/4)
    result = bootstrap([one], confidence=0.6)
    assert (result.difference, result.low, result.high) == (2, -1, 3)
    assert (bootstrap([one], confidence=0.4).low, bootstrap([one], confidence=0.4).high) == (2, 2)
    assert result.p == pytest.approx(2 * 1 / 4, abs=0.02)


def test_without_variation_the_interval_is_a_point():
    same = paired({"a": [2.5] * 4, "b": [2.5] * 9})
    for same_rows in (True, False):
        assert bootstrap([same] * 3, same_rows=same_rows, resamples=99) == Difference(2.5, 2.5, 2.5, 2 / 100)
    nothing = paired({"a": [0.0] * 4})
    assert bootstrap([nothing] * 2, resamples=99) == Difference(0, 0, 0, 1)


def test_symmetrical_differences_give_no_evidence():
    assert bootstrap([paired({"a": [-2.0, 2.0, -1.0, 1.0, -3.0, 3.0]})]).p > 0.9


def test_seeds_alone_give_students_t():
    means = [0.4, 1.1, 0.9, 0.2, 1.3]
    seeds = [paired({"a": [m - 1] * 3, "b": [m + 1] * 5}) for m in means]
    theirs = stats.ttest_1samp(means, 0)
    interval = theirs.confidence_interval(0.95)
    ours = bootstrap(seeds, resamples=200_000)
    assert (ours.low, ours.high) == (pytest.approx(interval.low, abs=0.02), pytest.approx(interval.high, abs=0.02))
    assert ours.p == pytest.approx(theirs.pvalue, rel=0.1)


def test_the_same_rows_are_drawn_for_all_seeds_together():
    seeds = [paired({"a": [-1.0, 1.0]}), paired({"a": [1.0, -1.0]})]  # every draw cancels between the seeds
    crossed = bootstrap(seeds)
    assert (crossed.low, crossed.high) == (0, 0)


def test_other_rows_in_every_seed_give_students_t_alone():
    """What rows add is in the differences between seeds already; it is not counted again."""
    draws = np.random.default_rng(8)
    rows = [{"a": list(draws.normal(0.3, size=20)), "b": list(draws.normal(0.5, size=12))} for _ in range(4)]
    seeds = [paired(seed) for seed in rows]
    means = [np.mean([np.mean(values) for values in seed.values()]) for seed in rows]
    interval = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    ours = bootstrap(seeds, same_rows=False, resamples=200_000)
    assert (ours.low, ours.high) == (pytest.approx(interval.low, abs=0.01), pytest.approx(interval.high, abs=0.01))


def test_rows_that_all_seeds_share_add_their_main_effect_once():
    """Balanced two-way layout: Var(mean) = (MS_seeds + MS_rows - MS_rest) / (S R), here as the interval's width."""
    draws = np.random.default_rng(9)
    S, R = 30, 60
    table = 0.2 * draws.normal(size=(S, 1)) + draws.normal(size=(1, R)) + 2.0 * draws.normal(size=(S, R))
    ours = bootstrap([paired({"a": list(row)}) for row in table], resamples=100_000)
    seeds, rows = table.mean(1), table.mean(0)
    rest = ((table - seeds[:, None] - rows[None] + table.mean()) ** 2).sum() / ((S - 1) * (R - 1))
    variance = seeds.var(ddof=1) / S + (rows.var(ddof=1) - rest / S) / R
    assert (ours.high - ours.low) / 2 == pytest.approx(2.01 * np.sqrt(variance), rel=0.05)
    twice = seeds.var(ddof=1) / S + rows.var(ddof=1) / R
    assert twice > 1.1 * variance


def test_a_row_of_several_seeds_or_clients_is_one_row():
    """Half of the rows of each seed are the same rows: less than Student's t alone would miss what they share."""
    shared, draws = np.random.default_rng(1).normal(size=20), np.random.default_rng(2)
    seeds = []
    for s in range(5):
        own = draws.normal(size=20)
        names = [f"shared {i}" for i in range(20)] + [f"seed {s}, {i}" for i in range(20)]
        seeds.append(Paired({"a": np.concatenate([shared, own])}, {"a": np.ones(40)}, {"a": names}))
    without = [Paired(seed.differences, seed.weights) for seed in seeds]
    wide, narrow = (bootstrap(found, same_rows=False) for found in (seeds, without))
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
    # The same values at two clients are one sample: its interval is that of one client.
    values, names = list(shared), list(range(20))
    one = Paired({"a": shared}, {"a": np.ones(20)}, {"a": names})
    both = paired({"a": values, "b": values})
    same = Paired(both.differences, both.weights, {"a": names, "b": names})
    widths = [found.high - found.low for found in (bootstrap([x]) for x in (one, same, both))]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[2] < 0.8 * widths[0]


def test_rows_may_differ_in_number_where_seeds_draw_their_own():
    seeds = [paired({"a": [1.0, 2.0]}), paired({"a": [1.0, 2.0, 3.0]})]
    assert bootstrap(seeds, same_rows=False).difference == 1.75
    with pytest.raises(DataError, match=r"a: \[2, 3\] rows"):
        bootstrap(seeds)


@pytest.mark.parametrize("same_rows", [True, False], ids=["crossed", "nested"])
@pytest.mark.parametrize(
    ("count", "of_seeds", "of_rows", "rest"), [(5, 0.3, 1.0, 0.5), (5, 0.02, 0.3, 1.0), (3, 0.3, 0.5, 1.0)]
)
def test_coverage(count, of_seeds, of_rows, rest, same_rows):
    """Counting the rows' part twice would give 0.97 to 0.996, drawing seeds with replacement 0.86 to 0.91."""
    draws, repeats, covered = np.random.default_rng(11), 1500, 0
    for repeat in range(repeats):
        common = of_rows * draws.normal(size=(1 if same_rows else count, 2, 40))
        values = 0.2 + of_seeds * draws.normal(size=(count, 1, 1)) + common
        values = values + rest * draws.normal(size=(count, 2, 40))
        seeds = [paired({"a": seed[0], "b": seed[1]}) for seed in values]
        result = bootstrap(seeds, same_rows=same_rows, resamples=400, seed=repeat)
        covered += result.low <= 0.2 <= result.high
    assert 0.93 <= covered / repeats <= 0.97


def test_the_order_of_clients_does_not_matter():
    draws = np.random.default_rng(3)
    rows = {client: list(draws.normal(size=8)) for client in "abc"}
    backwards = paired(dict(reversed(rows.items())))
    assert bootstrap([paired(rows)] * 2) == bootstrap([backwards] * 2)


def test_swapping_the_methods_swaps_the_ends():
    draws = np.random.default_rng(4)
    rows = [{"a": list(draws.normal(0.3, size=20))} for _ in range(3)]
    one = bootstrap([paired(seed) for seed in rows[:1]])
    swapped = bootstrap([paired({"a": [-v for v in seed["a"]]}) for seed in rows[:1]])
    assert (swapped.difference, swapped.p) == (-one.difference, one.p)
    assert (swapped.low, swapped.high) == (pytest.approx(-one.high), pytest.approx(-one.low))
    three = bootstrap([paired(seed) for seed in rows], resamples=100_000)
    other = bootstrap([paired({"a": [-v for v in seed["a"]]}) for seed in rows], resamples=100_000)
    assert other.low == pytest.approx(-three.high, rel=0.05)
    assert other.p == pytest.approx(three.p, rel=0.05)


def test_many_rows_are_drawn_in_parts(monkeypatch):
    one = [paired({"a": list(np.random.default_rng(1).normal(size=50))})]
    whole = bootstrap(one, resamples=999)
    monkeypatch.setattr("flexperts.studies.statistics._CELLS", 170)
    parts = bootstrap(one, resamples=999)  # the generator gives the same rows in parts of 3
    assert (parts.low, parts.high, parts.p) == (pytest.approx(whole.low), pytest.approx(whole.high), whole.p)


def test_adjusted_p_values_by_hand():
    assert adjust([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert adjust([0.2]) == [0.2]
    assert adjust([]) == []


@pytest.mark.parametrize(
    ("rows", "weights", "words"),
    [
        ({"a": [1.0, 2.0]}, {"a": [1.0]}, "one number per row"),
        ({"a": [1.0]}, {"b": [1.0]}, "the same clients"),
        ({}, {}, "the same clients"),
        ({"a": []}, {"a": []}, "one number per row"),
        ({"a": [1.0]}, {"a": [0.0]}, "above 0"),
        ({"a": [float("nan")]}, {"a": [1.0]}, "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(rows, weights, words):
    with pytest.raises(DataError, match=words):
        Paired({c: np.array(v) for c, v in rows.items()}, {c: np.array(v) for c, v in weights.items()})


def test_seeds_must_be_there_and_have_the_same_clients():
    with pytest.raises(DataError, match="at least one seed"):
        bootstrap([])
    with pytest.raises(DataError, match="every seed needs the same clients"):
        bootstrap([paired({"a": [1.0]}), paired({"b": [1.0]})])


@pytest.mark.parametrize("rows", [{"a": [0.3]}, {"a": [0.3], "b": [0.1, -0.2, 0.4]}])
def test_one_row_of_a_client_tells_no_interval(rows):
    found = bootstrap([paired(rows)])
    assert found.difference == pytest.approx(np.mean([np.mean(its) for its in rows.values()]))
    assert (found.low, found.high, found.p) == (None, None, None)
