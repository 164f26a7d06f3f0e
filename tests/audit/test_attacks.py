"""The attacks' arithmetic against hand computation, brute force, and updates of which the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexperts.audit.canaries import chance, exposures, secrets
from flexperts.audit.membership import auc, caught, membership
from flexperts.audit.words import matched

SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]), min_size=1, max_size=12)


def test_exposure_is_the_rank_in_bits() -> None:
    """Of eight candidates, a canary is first, fifth, and in a tie for the second and third place."""
    others = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert exposures([9.0, 3.5, 7.0], others) == pytest.approx([3.0, 3 - math.log2(5), 3 - math.log2(1.5)])


def test_a_model_that_knows_nothing_has_the_exposure_of_chance() -> None:
    assert chance(3) == pytest.approx((2 + 1 + (2 - math.log2(3)) + 0) / 4)


def test_secrets_differ_and_come_from_the_seed() -> None:
    drawn = [row.response for row in secrets(50, torch.Generator().manual_seed(3))]
    assert len(set(drawn)) == 50
    assert drawn == [row.response for row in secrets(50, torch.Generator().manual_seed(3))]
    assert all(len(one) == 10 and one.isdigit() for one in drawn)


@given(SCORES, SCORES)
def test_auc_counts_pairs(members: list[float], others: list[float]) -> None:
    pairs = [(a > b) + (a == b) / 2 for a in members for b in others]
    assert auc(np.array(members), np.array(others)) == pytest.approx(sum(pairs) / len(pairs))


@given(SCORES, SCORES, st.sampled_from([0.01, 0.05, 0.3]))
def test_no_threshold_with_so_few_false_alarms_finds_more(
    members: list[float], others: list[float], alarms: float
) -> None:
    allowed = [t for t in others if sum(o > t for o in others) <= alarms * len(others) + 1e-9]
    best = max(sum(m > t for m in members) / len(members) for t in allowed)
    assert caught(np.array(members), np.array(others), alarms) == pytest.approx(best)


def test_membership_intervals_hold_their_values() -> None:
    stream = np.random.default_rng(0)
    found = membership(stream.normal(1.0, 1.0, 200).tolist(), stream.normal(0.0, 1.0, 300).tolist(), seed=1)
    for name in ("auc", "at_1", "at_5"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["auc"]["low"] < 0.76 < found["auc"]["high"]  # Phi(1 / sqrt(2)), of two normal scores 1 apart


def _update(tokens: list[int], rank: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one step adds to A on these tokens, and every token's input; 500 tokens of width 128."""
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 128, generator=stream) + 0.5  # embeddings share a direction
    errors = torch.randn(len(tokens), rank, generator=stream)
    change = errors.T @ inputs[tokens]
    return change + noise * change.norm() * torch.randn(change.shape, generator=stream), inputs


def test_a_plain_gradient_gives_its_tokens_exactly() -> None:
    """Also those of more tokens than the gradient has rows, which a test of single tokens cannot decide."""
    tokens = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:30].tolist()
    for rank in (12, 30):
        change, inputs = _update(tokens, rank)
        assert set(matched(change, inputs, (), 30)) == set(tokens)


def test_known_tokens_are_explained_first_and_not_named() -> None:
    tokens = list(range(0, 60, 2))
    change, inputs = _update(tokens, 24)
    known = set(tokens[:10])
    named = matched(change, inputs, known, 20)
    assert set(named) == set(tokens) - known
    assert len(named) == len(set(named))


def test_noise_hides_the_tokens() -> None:
    tokens = list(range(0, 60, 2))
    change, inputs = _update(tokens, 24, noise=10.0)
    assert len(set(matched(change, inputs, (), 30)) & set(tokens)) < 10
