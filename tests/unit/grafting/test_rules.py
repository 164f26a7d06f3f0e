"""Every selection rule against brute force on explicit expert outputs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexperts.config.model import GraftConfig
from flexperts.errors import ConfigError, GraftError
from flexperts.selection.rules import RULES, coefficients, pick_layers, select, subset_error
from flexperts.selection.selection import LayerScores, products

Problem = tuple[LayerScores, np.ndarray, np.ndarray]
SEEDS = st.integers(0, 2**31)


def problem(seed: int = 0, N: int = 6, T: int = 9, D: int = 3) -> Problem:
    """A layer's sums, with the outputs they come from: experts ``[N, T D]`` and target ``[T D]``."""
    draw = np.random.default_rng(seed)
    experts = draw.normal(size=(N, T * D)) * draw.uniform(0.2, 3, size=(N, 1))
    target = draw.normal(size=N) @ experts / N + draw.normal(size=T * D)
    return sums(experts, target), experts, target


def sums(experts: np.ndarray, target: np.ndarray) -> LayerScores:
    layer = LayerScores.empty("layer", len(experts))
    outputs = torch.tensor(experts)[:, :, None]
    layer.add(products(torch.tensor(target)[:, None], [outputs], pairs=layer.pairs), outputs.shape[1])
    return layer


def lstsq_error(experts: np.ndarray, target: np.ndarray, subset: tuple[int, ...]) -> float:
    basis = experts[list(subset)].T
    return float(np.square(target - basis @ np.linalg.lstsq(basis, target)[0]).sum())


def pick(rule: str, layer: LayerScores, k: int, seed: int = 0) -> tuple[int, ...]:
    return select(rule, layer, k, torch.Generator().manual_seed(seed))


def ranked(values: list[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(values)), key=lambda s: values[s]))


def test_recipes_can_name_every_rule_and_no_other() -> None:
    assert set(get_args(GraftConfig.model_fields["selection"].annotation)) == set(RULES)


@given(SEEDS, st.integers(1, 6))
def test_reconstruction_has_the_smallest_single_losses(seed: int, k: int) -> None:
    layer, experts, target = problem(seed)
    losses = [float(np.square(target - expert).sum()) for expert in experts]
    assert layer.errors.tolist() == pytest.approx(losses)
    assert pick("reconstruction", layer, k) == layer.best(k) == ranked(losses)[:k]


@given(SEEDS, st.integers(1, 6))
def test_scaled_has_the_smallest_losses_at_the_best_factor(seed: int, k: int) -> None:
    layer, experts, target = problem(seed)
    losses = [lstsq_error(experts, target, (s,)) for s in range(6)]
    assert pick("scaled", layer, k) == ranked(losses)[:k]


@pytest.mark.parametrize("rule", ["scaled", "greedy", "exhaustive"])
def test_an_experts_length_does_not_matter_to(rule: str) -> None:
    layer, experts, target = problem(3)
    stretched = sums(experts * np.array([[1e-6], [1], [1e5], [3], [1], [1e-3]]), target)
    assert pick(rule, stretched, 2) == pick(rule, layer, 2)
    for pair in combinations(range(6), 2):
        assert subset_error(stretched, pair) == pytest.approx(subset_error(layer, pair))


def test_frequency_and_router_weight_follow_the_router() -> None:
    layer = LayerScores.empty("layer", 4)
    layer.add_routing(torch.tensor([[0, 1], [1, 3], [1, 3]]), torch.tensor([[0.9, 0.1], [0.2, 0.5], [0.25, 0.5]]))
    assert layer.counts.tolist() == [1, 3, 0, 2]
    assert layer.weights.tolist() == pytest.approx([0.9, 0.55, 0, 1.0])
    assert pick("frequency", layer, 4) == (1, 3, 0, 2)
    assert pick("router_weight", layer, 4) == (3, 0, 1, 2)


def test_random_is_uniform_and_only_of_the_stream() -> None:
    layer, _, _ = problem(N=4)
    stream = torch.Generator().manual_seed(0)
    drawn = [frozenset(select("random", layer, 2, stream)) for _ in range(3000)]
    shares = [drawn.count(frozenset(pair)) / len(drawn) for pair in combinations(range(4), 2)]
    assert shares == pytest.approx([1 / 6] * 6, abs=0.03)
    assert pick("random", layer, 3, seed=5) == pick("random", layer, 3, seed=5)


@settings(max_examples=40)
@given(SEEDS, st.integers(2, 7), st.integers(1, 3))
def test_each_greedy_step_is_the_best_extension(seed: int, N: int, k: int) -> None:
    (layer, experts, target), k = problem(seed, N), min(k, N)
    chosen = pick("greedy", layer, k)
    for step in range(k):
        start, rest = chosen[:step], set(range(N)) - set(chosen[:step])
        assert chosen[step] == min(rest, key=lambda s: lstsq_error(experts, target, (*start, s)))
    assert chosen[:1] == pick("scaled", layer, 1)


@settings(max_examples=40)
@given(SEEDS, st.integers(2, 7), st.integers(1, 3))
def test_exhaustive_is_the_minimum_over_all_subsets(seed: int, N: int, k: int) -> None:
    (layer, experts, target), k = problem(seed, N), min(k, N)
    errors = {subset: lstsq_error(experts, target, subset) for subset in combinations(range(N), k)}
    best = pick("exhaustive", layer, k)
    assert tuple(sorted(best)) == min(errors, key=errors.__getitem__)
    assert best == tuple(s for s in pick("scaled", layer, N) if s in best)
    assert subset_error(layer, best) == pytest.approx(min(errors.values()))
    assert subset_error(layer, pick("greedy", layer, k)) >= subset_error(layer, best) * (1 - 1e-12)


def test_greedy_can_miss_what_exhaustive_finds() -> None:
    """Two experts that rebuild the target together, and a third that is the best one alone."""
    experts = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 0.0, 0.5]])
    layer = sums(experts, np.array([1.0, 0.0, 0.0]))
    assert pick("greedy", layer, 2)[0] == 2
    assert set(pick("exhaustive", layer, 2)) == {0, 1}
    assert subset_error(layer, (0, 1)) == pytest.approx(0, abs=1e-12)


@given(SEEDS, st.permutations(range(6)), st.integers(1, 6))
def test_coefficients_and_error_are_those_of_least_squares(seed: int, order: list[int], k: int) -> None:
    layer, experts, target = problem(seed)
    chosen = tuple(order[:k])
    expected = np.linalg.lstsq(experts[list(chosen)].T, target)[0]
    assert coefficients(layer, chosen) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)
    assert subset_error(layer, chosen) == pytest.approx(lstsq_error(experts, target, chosen))


@given(SEEDS, st.permutations(range(6)))
def test_one_expert_more_never_hurts(seed: int, order: list[int]) -> None:
    layer, _, _ = problem(seed)
    errors = [layer.energy, *(subset_error(layer, order[:k]) for k in range(1, 7))]
    assert all(more <= less * (1 + 1e-12) for less, more in pairwise(errors))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_dead_and_equal_experts_do_no_harm(rule: str) -> None:
    """Expert 0 puts out nothing and 2 repeats 1."""
    _, experts, target = problem(1)
    experts[0], experts[2] = 0, experts[1]
    layer = sums(experts, target)
    for k in range(1, 7):
        chosen = pick(rule, layer, k)
        assert len(set(chosen)) == k
        assert set(chosen) <= set(range(6))
        assert all(map(math.isfinite, coefficients(layer, chosen)))
        assert subset_error(layer, chosen) == pytest.approx(lstsq_error(experts, target, chosen))
    assert coefficients(layer, (0, 1))[0] == 0
    one, two = coefficients(layer, (1, 2))
    assert one == pytest.approx(two)


def test_experts_alike_but_for_rounding_get_no_huge_coefficients() -> None:
    """What tells them apart is noise; least squares on it would answer with opposite numbers of a million."""
    _, experts, target = problem(2)
    experts[2] = 3 * experts[1] + 1e-6 * np.random.default_rng(0).normal(size=experts.shape[1])
    layer = sums(experts, target)
    assert max(map(abs, coefficients(layer, (1, 2)))) < 10
    assert subset_error(layer, (1, 2)) == pytest.approx(lstsq_error(experts, target, (1,)))


def test_a_silent_layer_is_no_accident() -> None:
    layer = sums(np.zeros((3, 4)), np.zeros(4))
    assert {rule: len(set(pick(rule, layer, 2))) for rule in RULES} == dict.fromkeys(RULES, 2)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("k", [-1, 0, 7])
def test_a_count_out_of_range_is_refused(rule: str, k: int) -> None:
    with pytest.raises(GraftError, match=rf"graft\.experts = {k}: layer has 6 experts"):
        pick(rule, problem()[0], k)


def test_unknown_rules_are_refused_with_the_close_one() -> None:
    with pytest.raises(ConfigError, match=r"graft\.selection = 'gredy'.*did you mean 'greedy'"):
        pick("gredy", problem()[0], 1)
    with pytest.raises(ConfigError, match="choose one of them"):
        pick("zzz", problem()[0], 1)


def test_too_many_subsets_are_refused_before_any_is_tried() -> None:
    layer = LayerScores.empty("layer", 60)
    with pytest.raises(
        GraftError, match=r"34220 subsets of 60 experts, and 20000 is the limit; use graft\.selection = 'greedy'"
    ):
        pick("exhaustive", layer, 3)
    assert len(pick("greedy", layer, 3)) == 3


@pytest.mark.parametrize("indices", [(), (1, 1), (6,), (-1,)])
def test_coefficients_need_different_experts_of_the_layer(indices: tuple[int, ...]) -> None:
    for function in (coefficients, subset_error):
        with pytest.raises(GraftError, match="different numbers from 0 to 5"):
            function(problem()[0], indices)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [((), "abcd"), ((0,), "a"), ((-1,), "d"), ((2, 0), "ac"), ((1, -3, 1), "b"), ((-4, 3), "ad")],
)
def test_layers_are_picked_in_the_models_order(wanted: tuple[int, ...], kept: str) -> None:
    layers = [replace(problem()[0], name=name) for name in "abcd"]
    assert [layer.name for layer in pick_layers(layers, wanted)] == list(kept)


@pytest.mark.parametrize("position", [4, -5])
def test_layers_that_are_not_there_are_refused(position: int) -> None:
    with pytest.raises(GraftError, match=rf"graft\.layers names {position}: the base has 4 MoE layers"):
        pick_layers([problem()[0]] * 4, (0, position))
