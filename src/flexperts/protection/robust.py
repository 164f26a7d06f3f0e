"""Robust rules, which tolerate some wrong updates: Flower's strategies, with the updates as replies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from flexperts.communication.messages import Update
from flexperts.errors import FederationError
from flexperts.parameters.vector import Vector
from flexperts.protection.protection import Protection


class RobustRule(Protection):
    """Median, trimmed mean or Krum in place of the mean."""

    key, unset = "federation.aggregation", "mean"

    @property
    def fewest(self) -> int:
        """Updates that the rule needs to tolerate a wrong one."""
        federation = self.config.federation
        return {
            "median": 3,
            "trimmed_mean": math.ceil(1 / federation.trim),
            "krum": federation.malicious_clients + 3,
        }[federation.aggregation]

    def combined(self, changes: Iterator[Update]) -> Vector:
        """Return the result of Flower's strategy on the changes.

        It gets changes and not weights: Flower's Krum computes squared distances as |x|^2 + |y|^2 - 2 x y, and in
        fp32 the distance is lost where weights are large compared with their changes.
        """
        held = list(changes)
        if len(held) < self.fewest:
            raise FederationError(
                f"{len(held)} updates for federation.aggregation = {self.config.federation.aggregation!r}",
                f"with its settings it needs at least {self.fewest}, or it gives no protection",
                "resume when more clients are up, or change federation.aggregation or its settings in a new run",
            )
        arrays, _ = self._strategy().aggregate_train(0, [_reply(change) for change in held])
        assert arrays is not None
        (array,) = arrays.values()
        return np.asarray(array.numpy(), dtype=np.float32)

    def _strategy(self) -> FedAvg:
        federation = self.config.federation
        if federation.aggregation == "median":
            return FedMedian()
        if federation.aggregation == "trimmed_mean":
            return FedTrimmedAvg(beta=federation.trim)
        return Krum(num_malicious_nodes=federation.malicious_clients)


def _reply(change: Update) -> Message:
    """Return a change as a message in the form that Flower's strategies need: one array, and a weight of 1."""
    content = RecordDict()
    content["arrays"] = ArrayRecord({"change": Array(change.vector)})
    content["metrics"] = MetricRecord({"num-examples": 1})
    return Message(content, dst_node_id=0, message_type="train")
