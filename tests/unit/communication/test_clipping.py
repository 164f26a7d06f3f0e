"""Clipping and noise, by hand and against Flower's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexperts.engines.flower_private import assume_identity
from flexperts.parameters.vector import Vector
from flexperts.protection.noise import clipped, gaussian, noised

CHANGES = arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def norm(vector: Vector) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


@given(CHANGES, st.floats(1e-6, 1e6))
def test_the_norm_is_at_most_clip(change: Vector, clip: float) -> None:
    got = clipped(change, clip)
    assert got.dtype == np.float32
    assert norm(got) <= clip * (1 + 1e-5) + 1e-37
    if norm(change) <= clip:
        assert got.tobytes() == change.tobytes()
    elif clip > 1e-3 * norm(change):  # else single values vanish
        np.testing.assert_allclose(norm(got), clip, rtol=1e-5)
        np.testing.assert_allclose(got.astype(np.float64) * norm(change) / clip, change, rtol=1e-5, atol=1e-30)


def test_by_hand() -> None:
    assert clipped(np.array([3, -4], np.float32), 10).tolist() == [3, -4]
    np.testing.assert_allclose(clipped(np.array([3, -4], np.float32), 1), [0.6, -0.8], rtol=1e-6)
    assert clipped(np.zeros(3, np.float32), 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("clip", [0.5, 3.0, 1e3])
def test_clipping_is_that_of_flowers_mod(clip: float) -> None:
    assume_identity(1)
    stream = np.random.default_rng(0)
    sent, trained = (stream.normal(size=1000).astype(np.float32) for _ in range(2))

    def app(message: Message, _context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(trained)})}), reply_to=message)

    request: Any = Message(RecordDict({"arrays": ArrayRecord({"w": Array(sent)})}), 1, "train")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply = LocalDpMod(clip, sensitivity=0.0, epsilon=1.0, delta=1e-5)(request, context, app)
    theirs = reply.content.array_records["arrays"]["w"].numpy()
    np.testing.assert_allclose(sent + noised(trained - sent, clip, 1e-12), theirs, rtol=1e-5, atol=1e-6)


def test_noise_is_normal_and_of_the_given_size() -> None:
    """200,000 values: mean and variance within six standard errors, tails as they should be."""
    noise = gaussian(200_000, 0.25).astype(np.float64) / 0.25
    assert noise.dtype == np.float64
    assert abs(noise.mean()) < 6 / 200_000**0.5
    assert abs(noise.var() - 1) < 6 * (2 / 200_000) ** 0.5
    for bound, share in ((1, 0.317311), (2, 0.0455), (3, 0.0027)):
        found = (np.abs(noise) > bound).mean()
        assert abs(found - share) < 6 * (share / 200_000) ** 0.5
    assert np.isfinite(noise).all()


@pytest.mark.parametrize(("clip", "multiplier"), [(2.0, 0.5), (0.1, 3.0)])
def test_local_noise_is_added_to_the_clipped_update(clip: float, multiplier: float) -> None:
    change = np.full(100_000, 1.0, np.float32)  # of norm 316
    got = noised(change, clip, multiplier).astype(np.float64)
    assert abs(got.std() / (clip * multiplier) - 1) < 0.02
    assert abs(got.mean() - clip / 100_000**0.5) < 6 * clip * multiplier / 100_000**0.5


def test_no_seed_repeats_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        drawn.append(gaussian(100, 1.0))
    assert not np.array_equal(*drawn)
    monkeypatch.setattr("os.urandom", lambda size: b"\xff" * size)
    top = gaussian(4, 1.0)
    monkeypatch.setattr("os.urandom", lambda size: bytes(size))
    assert np.isfinite(top).all()
    assert top.tolist() == (-gaussian(4, 1.0)).tolist()
    assert top[0] > 8
