"""Robust rules and central noise: by hand, against Flower's numbers, and what they keep off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Krum

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.errors import FederationError
from flexperts.parameters.vector import Manifest, Payload, Vector
from flexperts.protection.pipeline import reduced

Recipe = Callable[..., RunConfig]
SIZE = 1000
MANIFEST = Manifest(("w",), ((SIZE,),))


@pytest.fixture(autouse=True)
def server() -> None:
    assume_identity(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)


def payload(values: Any) -> Payload:
    return Payload(MANIFEST, np.broadcast_to(np.asarray(values, np.float32), SIZE).copy())


def updates(*values: Any) -> list[Update]:
    return [Update(f"c{i:02}", payload(v), 10 * (i + 1), {"loss": 1.0}) for i, v in enumerate(values)]


def one(config: RunConfig, sent: Payload, given: list[Update]) -> Update:
    (update,) = reduced(config, sent, iter(given))
    assert update.client == "all"
    assert update.rows == sum(u.rows for u in given)
    assert update.payload.manifest == MANIFEST
    assert update.vector.dtype == np.float32
    return update


SENT = payload(np.random.default_rng(0).normal(size=SIZE))
DRAWN = [SENT.vector + np.random.default_rng(i).normal(0, 0.1 * i, SIZE).astype(np.float32) for i in range(1, 7)]


def message(vector: Vector) -> Message:
    content = RecordDict({"arrays": ArrayRecord({"w": Array(vector)}), "m": MetricRecord({"num-examples": 1})})
    return Message(content, 0, "train")


def test_without_settings_updates_pass_as_they_come(recipe: Recipe) -> None:
    given = updates(*DRAWN)
    stream = iter(given)
    assert reduced(recipe(), SENT, stream) is stream


def test_median_and_trimmed_mean_by_hand(recipe: Recipe) -> None:
    given = updates(1, 2, 3, 4, 1000)
    assert one(recipe("federation.aggregation=median"), payload(0), given).vector.tolist() == [3] * SIZE
    trimmed = one(recipe("federation.aggregation=trimmed_mean", "federation.trim=0.2"), payload(0), given)
    assert trimmed.vector.tolist() == [3] * SIZE
    given = updates(-7, 1, 3, 1000)
    trimmed = one(recipe("federation.aggregation=trimmed_mean"), payload(0), given)
    assert trimmed.vector.tolist() == [2] * SIZE  # a quarter of four at either end


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum"])
@pytest.mark.parametrize("bad", [1e4, -3.0, "noise"])
def test_one_bad_update_does_not_sway_a_robust_rule(recipe: Recipe, rule: str, bad: Any) -> None:
    """Good updates are 0.1 of noise away from 1 everywhere; the mean is swayed, the rule is not."""
    stream = np.random.default_rng(5)
    good = [1 + stream.normal(0, 0.1, SIZE) for _ in range(5)]
    wrong = stream.normal(0, 50, SIZE) if bad == "noise" else bad
    given = updates(*good[:2], wrong, *good[2:])
    config = recipe(f"federation.aggregation={rule}")
    got = one(config, payload(0), given).vector
    assert np.abs(got - 1).max() < 0.6
    assert np.abs(got - 1).mean() < 0.1
    assert np.abs(np.mean([u.vector for u in given], axis=0) - 1).mean() > 0.5
    if rule == "krum":
        assert any(np.allclose(got, g, atol=1e-6) for g in good)


def test_krum_sees_small_changes_of_large_weights(recipe: Recipe) -> None:
    """In fp32, on the weights themselves, Flower's distances are rounding errors and its choice is by chance."""
    sent, taken_in = payload(300), 0
    for seed in range(20):
        stream = np.random.default_rng(seed)
        good = [sent.vector + stream.normal(0, 0.01, SIZE).astype(np.float32) for _ in range(5)]
        wrong = sent.vector - np.float32(0.1)
        chosen = one(recipe("federation.aggregation=krum"), sent, updates(wrong, *good)).vector
        assert np.abs(chosen - sent.vector).mean() < 0.02
        arrays, _ = Krum(num_malicious_nodes=1).aggregate_train(0, [message(v) for v in (wrong, *good)])
        assert arrays is not None
        taken_in += np.array_equal(arrays["w"].numpy(), wrong)
    assert taken_in  # if this fails, Flower has fixed it, and weights can be passed on


@pytest.mark.parametrize(
    ("settings", "count", "said"),
    [
        (("median",), 2, "at least 3"),
        (("trimmed_mean",), 3, "at least 4"),
        (("trimmed_mean", "federation.trim=0.1"), 9, "at least 10"),
        (("krum",), 3, "at least 4"),
        (("krum", "federation.malicious_clients=2"), 4, "at least 5"),
    ],
)
def test_too_few_updates_are_refused(recipe: Recipe, settings: tuple[str, ...], count: int, said: str) -> None:
    """With one more the rule has something to do; Flower's trimmed mean would silently be a mean."""
    config = recipe(f"federation.aggregation={settings[0]}", *settings[1:])
    with pytest.raises(FederationError, match=f"{count} updates for federation.aggregation.*{said}"):
        reduced(config, payload(0), updates(*range(count)))
    got = one(config, payload(0), updates(*[0.0] * count, 1e6))
    assert np.abs(got.vector).max() == 0


@pytest.mark.parametrize(
    "settings", ["federation.aggregation=median", "privacy.noise=central", "privacy.noise=local"]
)
def test_no_update_or_a_bad_one_is_refused(recipe: Recipe, settings: str) -> None:
    with pytest.raises(FederationError, match="no update arrived"):
        reduced(recipe(settings), SENT, iter(()))
    for bad in (np.nan, np.inf):
        values = np.zeros(SIZE)
        values[3] = bad
        with pytest.raises(FederationError, match=r"c01: 1 rows, .* values not finite"):
            reduced(recipe(settings), payload(0), updates(0, values, 0))


@pytest.mark.parametrize("clip", [0.5, 5.0, 1e3])
def test_central_clipping_and_mean_are_flowers(recipe: Recipe, clip: float) -> None:
    """Their norms go from 3 to 19: all, some and none of them are clipped."""
    wrapper = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1e-9, clip, len(DRAWN))
    wrapper.current_arrays = ArrayRecord({"w": Array(SENT.vector)})
    arrays, _ = wrapper.aggregate_train(1, [message(v) for v in DRAWN])
    assert arrays is not None
    config = recipe("privacy.noise=central", f"privacy.clip={clip}", "privacy.noise_multiplier=1e-9")
    got = one(config, SENT, updates(*DRAWN))
    np.testing.assert_allclose(got.vector, arrays["w"].numpy(), rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(got.vector - SENT.vector) <= clip * 1.001


def test_an_update_that_changes_nothing_counts(recipe: Recipe) -> None:
    """Flower's clipping divides by its norm, 0."""
    config = recipe("privacy.noise=central", "privacy.clip=1e6", "privacy.noise_multiplier=1e-12")
    assert np.allclose(one(config, payload(0), updates(0, 3)).vector, 1.5, atol=1e-4)
    wrapper = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 1)
    wrapper.current_arrays = ArrayRecord({"w": Array(SENT.vector)})
    with pytest.raises(ZeroDivisionError):
        wrapper.aggregate_train(1, [message(SENT.vector)])


@pytest.mark.parametrize(("count", "clip", "multiplier"), [(1, 1.0, 1.0), (4, 0.3, 2.0), (16, 5.0, 0.5)])
def test_central_noise_is_for_as_many_as_arrived(
    recipe: Recipe, count: int, clip: float, multiplier: float
) -> None:
    """std = multiplier clip / n; over 20,000 values, known to 0.5 %."""
    config = recipe("privacy.noise=central", f"privacy.clip={clip}", f"privacy.noise_multiplier={multiplier}")
    noise = [one(config, SENT, updates(*[SENT.vector] * count)).vector - SENT.vector for _ in range(20)]
    expected = multiplier * clip / count
    assert abs(np.std(noise) / expected - 1) < 0.03
    assert abs(np.mean(noise)) < 0.04 * expected
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.2


def test_noise_does_not_follow_numpys_seed(recipe: Recipe) -> None:
    config, got = recipe("privacy.noise=central"), []
    for _ in range(2):
        np.random.seed(0)
        got.append(one(config, SENT, updates(SENT.vector)).vector)
    assert not np.array_equal(*got)


def test_under_local_noise_clients_count_once_and_nothing_is_added(recipe: Recipe) -> None:
    got = one(recipe("privacy.noise=local", "privacy.clip=1e-3"), payload(0), updates(1, 2, 6))
    np.testing.assert_allclose(got.vector, 3, rtol=1e-6)  # by rows, 10, 20 and 30, it would be 3.83


def test_updates_are_left_as_they_came(recipe: Recipe) -> None:
    for setting in ("federation.aggregation=median", "federation.aggregation=krum", "privacy.noise=central"):
        given = updates(*DRAWN)
        one(recipe(setting), SENT, given)
        assert all(np.array_equal(u.vector, v) for u, v in zip(given, DRAWN, strict=True))
