"""The weighted mean: right, in fp32, one update at a time, and nothing dubious let in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexperts.communication.average import holders_mean, weighted_mean
from flexperts.communication.messages import Update
from flexperts.errors import FederationError
from flexperts.parameters.vector import Manifest, Payload, Vector


def update(client: str, values: list[float] | Vector, rows: int = 1) -> Update:
    vector = np.asarray(values, dtype=np.float32)
    return Update(client, Payload(Manifest(("w",), (vector.shape,)), vector), rows, {})


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


@pytest.mark.parametrize("size", [1, 7, 8, 65, 100_003])
def test_products_are_rounded_before_they_are_added(size: int) -> None:
    """To the bit what two operations give, though the processor may fuse them; also of what cannot be written."""
    stream = np.random.default_rng(size)
    updates = [update(f"c{i}", stream.standard_normal(size), int(stream.integers(1, 5000))) for i in range(5)]
    expected = updates[0].vector * np.float32(updates[0].rows)
    for one in updates[1:]:
        expected = expected + one.vector * np.float32(one.rows)
        one.vector.flags.writeable = False
    expected = expected / np.float32(sum(one.rows for one in updates))
    assert weighted_mean(updates).tobytes() == expected.tobytes()


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
        ([update("b", [1]), update("a", [1])], "a after b: updates must be sorted by client"),
        ([update("a", [1]), update("a", [1])], "a after a: updates must be sorted by client"),
        ([update("a", [1]), update("b", [1, 2])], "b sent 2 values: others sent 1"),
        ([update("a", [1]), update("b", [[1.0]])], "b sent 1 values"),  # type: ignore[list-item]
        ([update("a", [1], rows=0)], "a: 0 rows, 0 values not finite"),
        ([update("a", [1]), update("b", [1], rows=-3)], "b: -3 rows"),
        ([update("a", [1, float("nan"), 2])], "the mean of the updates: its values must be finite"),
        ([update("a", [1]), update("b", [float("-inf")])], "the mean of the updates: its values must be finite"),
        ([update("a", [3e38]), update("b", [3e38])], "the mean of the updates: its values must be finite"),
    ],
)
def test_refusals(updates: list[Update], said: str) -> None:
    with pytest.raises(FederationError) as caught:
        weighted_mean(iter(updates))
    assert str(caught.value).startswith(said)


def holding(client: str, rows: int = 1, **tensors: Tensor | list[float]) -> Update:
    return Update(client, Payload.of({n: torch.as_tensor(t) for n, t in tensors.items()}), rows, {})


def test_each_tensor_is_averaged_over_its_holders() -> None:
    """Held by nobody: unchanged; by one: copied, whatever its rows; by several: weighted by the holders' rows."""
    current = {n: torch.tensor([10.0, 20.0]) for n in ("nobody", "one", "two", "all")}
    updates = [
        holding("a", 1, one=[0.5, -3.0], two=[4.0, 0.0], all=[1.0, 1.0]),
        holding("b", 3, two=[0.0, 8.0], all=[2.0, 2.0]),
        holding("c", 4, all=[3.0, 5.0]),
    ]
    mean = holders_mean(current, iter(updates))
    assert {n: t.tolist() for n, t in mean.items()} == {
        "nobody": [10, 20],
        "one": [0.5, -3],
        "two": [1, 6],  # (1 * 4 + 3 * 0) / 4, (1 * 0 + 3 * 8) / 4
        "all": [2.375, 3.375],  # (1 + 3 * 2 + 4 * 3) / 8, (1 + 3 * 2 + 4 * 5) / 8
    }
    assert all(t.dtype == torch.float32 for t in mean.values())
    assert all(t.tolist() == [10, 20] for t in current.values())
    assert updates[1].tensors()["all"].tolist() == [2, 2]


def test_nobody_sends_anything() -> None:
    current = {"a": torch.tensor([1.0])}
    assert holders_mean(current, [holding("a"), holding("b")])["a"].tolist() == [1]
    with pytest.raises(FederationError, match="no update arrived"):
        holders_mean(current, [])


HELD = st.lists(st.tuples(st.sets(st.sampled_from("xyz")), st.integers(1, 5000)), min_size=1, max_size=6)


@given(HELD, st.integers(0, 2**32))
def test_holders_against_float64(holders: list[tuple[set[str], int]], seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    current = {name: torch.randn(3, 2, generator=stream) for name in "xyz"}
    sent = [{n: torch.randn(3, 2, generator=stream) for n in sorted(names)} for names, _ in holders]
    updates = [holding(f"c{i}", rows, **sent[i]) for i, (_, rows) in enumerate(holders)]
    mean = holders_mean(current, updates)
    assert mean.keys() == current.keys()
    for name in current:
        having = [
            (tensors[name].double(), rows)
            for tensors, (_, rows) in zip(sent, holders, strict=True)
            if name in tensors
        ]
        if not having:
            assert torch.equal(mean[name], current[name])
        else:
            expected = sum(t * r for t, r in having) / sum(r for _, r in having)
            torch.testing.assert_close(mean[name].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_everybody_holds_is_averaged_as_by_weighted_mean() -> None:
    updates = [update("a", [1, 0, -4], 1), update("b", [3, 4, 0], 3)]
    assert holders_mean({"w": torch.zeros(3)}, updates)["w"].tolist() == weighted_mean(updates).tolist()


@pytest.mark.parametrize(
    ("updates", "said"),
    [
        ([holding("b", w=[1.0]), holding("a", w=[1.0])], "a after b: updates must be sorted by client"),
        ([holding("a", w=[1.0]), holding("a", w=[1.0])], "a after a: updates must be sorted by client"),
        ([holding("a", x=[1.0])], "a sent x: no such tensor is shared"),
        ([holding("a", w=[1.0, 2.0])], "a sent w: no such tensor is shared"),
        ([holding("a", w=[[1.0]])], "a sent w: no such tensor is shared"),
        ([holding("a", 0, w=[1.0])], "a: 0 rows"),
        ([holding("a", w=[1.0]), holding("b", w=[float("nan")])], "b: 1 rows, 1 values not finite"),
    ],
)
def test_holders_refusals(updates: list[Update], said: str) -> None:
    with pytest.raises(FederationError) as caught:
        holders_mean({"w": torch.zeros(1)}, iter(updates))
    assert str(caught.value).startswith(said)
