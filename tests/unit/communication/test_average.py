"""The weighted mean: right, in fp32, one update at a time, and nothing dubious let in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.communication.average import weighted_mean
from flexperts.communication.messages import Update
from flexperts.errors import FederationError
from flexperts.parameters.vector import Vector


def update(client: str, values: list[float] | Vector, rows: int = 1) -> Update:
    return Update(client, np.asarray(values, dtype=np.float32), rows, {})


def test_by_hand() -> None:
    mean = weighted_mean([update("a", [1, 0, -4], 1), update("b", [3, 4, 0], 3)])
    assert mean.tolist() == [2.5, 3.0, -1.0]
    assert mean.dtype == np.float32


def test_one_update_is_itself() -> None:
    values = np.array([0.1, -2e-3, 7e5], np.float32)
    np.testing.assert_allclose(weighted_mean([update("a", values, 37)]), values, rtol=2e-7)


VALUES = st.floats(-100, 100, width=32)
UPDATES = st.integers(1, 6).flatmap(
    lambda size: st.lists(
        st.tuples(st.lists(VALUES, min_size=size, max_size=size), st.integers(1, 5000)), min_size=1, max_size=8
    )
)


@given(UPDATES)
def test_against_float64(given_updates: list[tuple[list[float], int]]) -> None:
    updates = [update(f"c{i}", values, rows) for i, (values, rows) in enumerate(given_updates)]
    mean = weighted_mean(updates)
    values = np.array([u.vector for u in updates], dtype=np.float64)
    rows = np.array([u.rows for u in updates], dtype=np.float64)
    expected = (values * rows[:, None]).sum(0) / rows.sum()
    # Each of the n terms and sums rounds once, relative to the largest partial sum.
    bound = (np.abs(values) * rows[:, None]).sum(0) / rows.sum() * (len(updates) + 2) * 2.0**-24
    assert mean.dtype == np.float32
    assert mean.shape == expected.shape
    assert (np.abs(mean - expected) <= bound + 1e-37).all()


def test_updates_are_left_as_they_came() -> None:
    updates = [update("a", [1, 2], 2), update("b", [3, 4], 3)]
    mean = weighted_mean(updates)
    assert [u.vector.tolist() for u in updates] == [[1, 2], [3, 4]]
    assert not any(np.shares_memory(mean, u.vector) for u in updates)


def test_updates_are_added_as_they_arrive() -> None:
    """When a reply is asked for, at most the one before it is still in memory, however many there are."""
    seen: list[weakref.ref[Vector]] = []
    alive: list[int] = []

    def arriving() -> Iterator[Update]:
        for number in range(12):
            alive.append(sum(ref() is not None for ref in seen))
            vector = np.full(1000, number, np.float32)
            seen.append(weakref.ref(vector))
            made = update(f"c{number:02}", vector)
            del vector
            yield made
            del made

    assert weighted_mean(arriving()).tolist() == [5.5] * 1000
    assert len(alive) == 12
    assert max(alive) <= 1


def test_an_empty_vector_averages_to_an_empty_one() -> None:
    """Methods that share nothing pass through the same code."""
    assert weighted_mean([update("a", []), update("b", [])]).shape == (0,)


@pytest.mark.parametrize(
    ("updates", "said"),
    [
        ([], "no update arrived"),
        ([update("b", [1]), update("a", [1])], "a after b: updates are averaged sorted by client"),
        ([update("a", [1]), update("a", [1])], "a after a: updates are averaged sorted by client"),
        ([update("a", [1]), update("b", [1, 2])], "b sent 2 values: others sent 1"),
        ([update("a", [1]), update("b", [[1.0]])], "b sent 1 values"),  # type: ignore[list-item]
        ([update("a", [1], rows=0)], "a: 0 rows, 0 values not finite"),
        ([update("a", [1]), update("b", [1], rows=-3)], "b: -3 rows"),
        ([update("a", [1, float("nan"), float("inf")])], "a: 1 rows, 2 values not finite"),
        ([update("a", [1]), update("b", [float("-inf")])], "b: 1 rows, 1 values not finite"),
    ],
)
def test_refusals(updates: list[Update], said: str) -> None:
    with pytest.raises(FederationError) as caught:
        weighted_mean(iter(updates))
    assert str(caught.value).startswith(said)
