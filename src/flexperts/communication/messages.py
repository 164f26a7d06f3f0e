"""What crosses the wire: shared vectors and small records, and nothing else.

A message's arrays can be built from a ``ParameterSplit``'s shared group only; personal and frozen parameters
have no way in. Requests: ``query.join`` (who are you), ``train``, ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flexperts.errors import FederationError, PrivacyError
from flexperts.parameters.split import ParameterSplit, aliases
from flexperts.parameters.vector import Manifest, Vector, flatten

SHARED = "shared"
_INFO, _METRICS = "info", "metrics"

Info = Mapping[str, Any]
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Update:
    """One client's reply to a train request.

    Args:
        client: Name of the client.
        vector: Its shared weights after local training, flat.
        rows: Its train rows: the weight in the average.
        metrics: What it reports of its training.
    """

    client: str
    vector: Vector
    rows: int
    metrics: Metrics


def encode_shared(split: ParameterSplit) -> Vector:
    """Return the shared group of a split as one flat vector: the only road from parameters to the wire.

    Raises:
        PrivacyError: The argument is no split, or a shared tensor shares memory with a personal or frozen one.
    """
    if not isinstance(split, ParameterSplit):
        raise PrivacyError(
            f"{type(split).__name__} given to the encoder",
            "only a ParameterSplit is encoded",
            "split the parameters",
        )
    if leaked := aliases(split):
        raise PrivacyError(
            f"shared {leaked[0]}", "its memory belongs to a parameter that stays on the client", "split again"
        )
    return flatten(split.shared)


def records(info: Info, metrics: Metrics | None = None, vector: Vector | None = None) -> RecordDict:
    """Build a message's content: text and numbers, and at most the one shared vector."""
    content = RecordDict({_INFO: ConfigRecord(dict(info))})
    if metrics is not None:
        content[_METRICS] = MetricRecord(dict(metrics))
    if vector is not None and vector.size:
        content[SHARED] = ArrayRecord({SHARED: Array(np.ascontiguousarray(vector, dtype=np.float32))})
    return content


def info_of(message: Message) -> Info:
    """Return a message's text and whole-number fields."""
    return dict(message.content.config_records[_INFO])


def metrics_of(message: Message) -> Metrics:
    """Return a message's numeric fields."""
    return dict(message.content.metric_records[_METRICS].items())


def vector_of(message: Message, size: int, sender: str) -> Vector:
    """Return a message's shared vector, checked on arrival.

    Args:
        message: A request or a reply.
        size: Elements that the manifest asks for; 0 where the method sends nothing.
        sender: Who sent it, for errors.

    Raises:
        FederationError: The message holds another array than the shared vector, or one that does not fit.
    """
    arrays = {
        f"{r}/{a}": array for r, record in message.content.array_records.items() for a, array in record.items()
    }
    if not size and not arrays:
        return np.zeros(0, dtype=np.float32)
    if set(arrays) != {f"{SHARED}/{SHARED}"}:
        raise FederationError(
            f"{sender} sent arrays {sorted(arrays)}",
            "a message carries the shared vector and no other",
            "refuse it",
        )
    vector: Vector = arrays[f"{SHARED}/{SHARED}"].numpy()
    if vector.dtype != np.float32 or vector.shape != (size,):
        raise FederationError(
            f"{sender} sent {vector.dtype}{list(vector.shape)}",
            f"the manifest asks for float32[{size}]",
            "use one flexperts version and one recipe on every silo",
        )
    return vector


def check_manifest(message: Message, manifest: Manifest, receiver: str) -> None:
    """Refuse a request that was built for other shared weights than the receiver's.

    Raises:
        FederationError: The digests differ.
    """
    if info_of(message).get("manifest") != manifest.digest:
        raise FederationError(
            f"{receiver}: the server's manifest differs from this client's",
            "names and shapes of the shared weights must agree",
            "use one flexperts version and one recipe on every silo",
        )
