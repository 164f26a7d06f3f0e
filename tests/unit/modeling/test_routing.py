"""Routing in numbers: four tokens, three experts, every value by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from flexperts.modeling.routing import LayerRouting, summarize_routing

THIRD = 1 / 3
NOW = LayerRouting(
    index=torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2]]),
    weight=torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.6, 0.4], [1.0, 0.0]]),  # the last slot selects nothing
    experts=3,
    probabilities=torch.tensor([[0.5, 0.5, 0.0], [THIRD] * 3, [1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]),
)
BASE = LayerRouting(
    index=torch.tensor([[1, 0], [0, 2], [1, 2], [0, 2]]),
    weight=torch.full((4, 2), 0.5),
    experts=3,
    probabilities=torch.tensor([[0.5, 0.5, 0.0], [THIRD] * 3, [0.0, 1.0, 0.0], [0.25, 0.5, 0.25]]),
)


def test_one_state_by_hand() -> None:
    numbers = summarize_routing(NOW)
    assert numbers["tokens"] == 4
    assert numbers["utilisation"] == pytest.approx([4 / 7, 3 / 7, 0], rel=1e-5)
    assert numbers["mean_weight"] == pytest.approx([2.85 / 4, 1.15 / 4, 0], rel=1e-5)
    # Entropies of the four rows: ln 2, ln 3, 0, and 0.5 ln 2 + 2 * 0.25 ln 4 = 1.5 ln 2.
    assert numbers["entropy"] == pytest.approx((2.5 * log(2) + log(3)) / 4, rel=1e-5)
    assert numbers["full"] is True
    assert numbers["load_entropy"] == pytest.approx((4 / 7 * log(7 / 4) + 3 / 7 * log(7 / 3)) / log(3), rel=1e-5)
    assert numbers["dead"] == [2]
    assert numbers["co_selection"] == [[1.0, 0.75, 0.0], [0.75, 0.75, 0.0], [0.0, 0.0, 0.0]]
    assert not {"agreement", "divergence", "utilisation_divergence"} & numbers.keys()


def test_against_the_base_by_hand() -> None:
    numbers = summarize_routing(NOW, BASE)
    # Same experts in another order; one of two; one of two; {0} against {0, 2}.
    assert numbers["agreement"] == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    # 0, 0, ln 2 for disjoint ones, and with the middle (3/8, 3/8, 1/4): 0.5 ln(4/3) + 0.25 ln(2/3).
    assert numbers["divergence"] == pytest.approx((log(2) + 0.5 * log(4 / 3) + 0.25 * log(2 / 3)) / 4, rel=1e-5)
    loads = [4 / 7, 3 / 7, 0], [3 / 8, 2 / 8, 3 / 8]
    assert numbers["utilisation_divergence"] == pytest.approx(jensenshannon(*loads) ** 2, rel=1e-5)
    assert summarize_routing(NOW, BASE).items() >= summarize_routing(NOW).items()


def test_without_the_full_distribution_the_entropy_is_of_the_chosen() -> None:
    numbers = summarize_routing(replace(NOW, probabilities=None), BASE)
    rows = [0.75 * log(4 / 3) + 0.25 * log(4), log(2), -0.6 * log(0.6) - 0.4 * log(0.4), 0.0]
    assert numbers["entropy"] == pytest.approx(sum(rows) / 4, rel=1e-5)
    assert numbers["full"] is False
    assert numbers["divergence"] is None
    assert summarize_routing(NOW, replace(BASE, probabilities=None))["divergence"] is None
    # Weights that do not sum to 1 are scaled first.
    scaled = replace(NOW, probabilities=None, weight=2.5 * NOW.weight)
    assert summarize_routing(scaled)["entropy"] == numbers["entropy"]


def test_an_index_that_is_no_experts_selects_nothing() -> None:
    """Expert-parallel sentinels and identity experts lie at N and above."""
    beyond = LayerRouting(torch.tensor([[0, 3], [3, 4]]), torch.full((2, 2), 0.5), experts=3)
    numbers = summarize_routing(beyond, beyond)
    assert numbers["utilisation"] == [1.0, 0.0, 0.0]
    assert numbers["mean_weight"] == [0.25, 0.0, 0.0]
    assert numbers["co_selection"][0][0] == 0.5
    assert numbers["agreement"] == 1.0


def test_tokens_that_select_nobody_are_no_division_by_zero() -> None:
    nobody = LayerRouting(torch.tensor([[0, 1]]), torch.zeros(1, 2), experts=2)
    numbers = summarize_routing(nobody, nobody)
    assert numbers["utilisation"] == [0.0, 0.0]
    assert numbers["dead"] == [0, 1]
    assert numbers["entropy"] == numbers["load_entropy"] == 0.0
    assert numbers["agreement"] == 1.0
    one = LayerRouting(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), experts=1)
    assert summarize_routing(one)["load_entropy"] == 1.0


def test_distributions_that_differ_by_rounding_only_have_a_number() -> None:
    """SciPy's distance takes the root of a sum that rounding can make negative."""
    first = torch.rand(2000, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    second = first * (1 + 1e-7 * torch.randn(first.shape, generator=torch.Generator().manual_seed(1)))
    index, weight = first.topk(2).indices, first.topk(2).values
    states = [LayerRouting(index, weight, 8, probabilities) for probabilities in (first, second)]
    assert 0 <= summarize_routing(*states)["divergence"] < 1e-13
    assert summarize_routing(states[0], states[0])["divergence"] == 0


def test_many_distributions_agree_with_scipy() -> None:
    first, second = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(2)).softmax(-1)
    index, weight = first.topk(2).indices, first.topk(2).values
    numbers = summarize_routing(*(LayerRouting(index, weight, 6, p) for p in (first, second)))
    expected = jensenshannon(first.double().numpy(), second.double().numpy(), axis=1) ** 2
    assert numbers["divergence"] == pytest.approx(expected.mean(), rel=1e-5)


def test_numbers_are_short_plain_json() -> None:
    numbers = summarize_routing(NOW, BASE)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers["utilisation"] == [0.571429, 0.428571, 0.0]
