"""Making one update of a round's updates before a method sees them: robust rules, and noise on their mean.

The robust rules are Flower's strategies, which are given the updates as replies. Central differential privacy is a
few lines of our own: Flower's wrapper draws its noise from NumPy's global stream, which any library may have
seeded, takes the number of clients that were sampled for the number that answered, fails on an update of norm 0,
and holds all replies in memory. ``tests/federation/test_reduction.py`` holds clipping and mean to its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from flexperts.communication.average import checked, weighted_mean
from flexperts.communication.messages import Update
from flexperts.config.federation import FederationConfig, PrivacyConfig
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.parameters.vector import Payload, Vector
from flexperts.protection.clipping import clipped, gaussian

EVERYONE = "all"
"""Client of the update that stands for all."""


def reduced(config: RunConfig, sent: Payload, updates: Iterable[Update]) -> Iterable[Update]:
    """Return the updates that a method is to average: the clients' own, or one that stands for all.

    Under noise and robust rules every client counts once, whatever its rows.

    Args:
        config: The run.
        sent: The shared weights that the clients were sent.
        updates: Replies of the same manifest, sorted by client.

    Raises:
        FederationError: There are too few updates for the rule, or one is not finite.
    """
    federation, privacy = config.federation, config.privacy
    if federation.aggregation == "mean" and privacy.noise == "none":
        return updates
    rows: list[int] = []
    changes = checked(_changes(sent, updates, rows))
    change = _mean(privacy, changes) if federation.aggregation == "mean" else _robust(federation, list(changes))
    return [Update(EVERYONE, Payload(sent.manifest, sent.vector + change), sum(rows), {})]


def fewest(federation: FederationConfig) -> int:
    """Return how many updates the rule needs to keep off any wrong one."""
    return {
        "mean": 1,
        "median": 3,
        "trimmed_mean": math.ceil(1 / federation.trim),
        "krum": federation.malicious_clients + 3,
    }[federation.aggregation]


def _changes(sent: Payload, updates: Iterable[Update], rows: list[int]) -> Iterator[Update]:
    """Yield what training has changed in place of the weights, each with weight 1, and note the rows."""
    for update in updates:
        rows.append(update.rows)
        yield replace(update, payload=Payload(sent.manifest, update.vector - sent.vector), rows=1)


def _mean(privacy: PrivacyConfig, changes: Iterable[Update]) -> Vector:
    """Return the mean change; under central noise, of clipped ones, with noise for as many as there are."""
    if privacy.noise == "local":
        return weighted_mean(changes)
    clients: list[str] = []
    mean = weighted_mean(_clipped(changes, privacy.clip, clients))
    return mean + gaussian(mean.size, privacy.noise_multiplier * privacy.clip / len(clients))


def _clipped(changes: Iterable[Update], clip: float, clients: list[str]) -> Iterator[Update]:
    for change in changes:
        clients.append(change.client)
        yield replace(change, payload=replace(change.payload, vector=clipped(change.vector, clip)))


def _robust(federation: FederationConfig, changes: list[Update]) -> Vector:
    """Return what Flower's strategy makes of the changes.

    Changes and not weights: Flower's Krum takes squared distances as |x|^2 + |y|^2 - 2 x y, and in fp32 nothing of
    the distance is left where weights are large beside their changes.
    """
    if len(changes) < fewest(federation):
        raise FederationError(
            f"{len(changes)} updates for federation.aggregation = {federation.aggregation!r}",
            f"with its settings it needs at least {fewest(federation)}, or it keeps nothing off",
            "resume when more clients are up, or change federation.aggregation or its settings in a new run",
        )
    arrays, _ = _strategy(federation).aggregate_train(0, [_reply(change) for change in changes])
    assert arrays is not None
    (array,) = arrays.values()
    return np.asarray(array.numpy(), dtype=np.float32)


def _strategy(federation: FederationConfig) -> FedAvg:
    if federation.aggregation == "median":
        return FedMedian()
    if federation.aggregation == "trimmed_mean":
        return FedTrimmedAvg(beta=federation.trim)
    return Krum(num_malicious_nodes=federation.malicious_clients)


def _reply(change: Update) -> Message:
    """Return a change as a message of the form that Flower's strategies take: one array, and a weight of 1."""
    content = RecordDict()
    content["arrays"] = ArrayRecord({"change": Array(change.vector)})
    content["metrics"] = MetricRecord({"num-examples": 1})
    return Message(content, dst_node_id=0, message_type="train")
