"""Encoded messages of a planned run: what the ledger of a run counts, from sizes alone.

Each message is built as a run builds it, around arrays of a few values, and the planned bytes of the weights take
the place of these. Numbers in it are typical ones, whose encoded size differs by a few bytes from those of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flexperts.client.model import ClientModel
from flexperts.communication.compression import Packed, pack, packed_bytes
from flexperts.communication.messages import difference_records, records
from flexperts.communication.schema import MEASURES, answer_counts
from flexperts.communication.traffic import encoded_bytes, payload_bytes
from flexperts.communication.versions import most_differences, size_of
from flexperts.config.federation import CompressionConfig
from flexperts.config.run import RunConfig
from flexperts.evaluation.scores import REWARDS
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Manifest, Payload
from flexperts.protection.pipeline import told

_HASH, _RUN = "f" * 64, "f" * 32
_NUMBER, _COUNT = 1.2345678, 1000


@dataclass(frozen=True)
class Messages:
    """Encoded bytes of a round's messages.

    Args:
        up: Client -> bytes that it sends.
        down: Client -> bytes that it receives.
    """

    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)

    def add(self, other: Messages) -> None:
        """Add other messages of the round."""
        for own, more in ((self.up, other.up), (self.down, other.down)):
            for name, size in more.items():
                own[name] = own.get(name, 0) + size

    @property
    def most(self) -> int:
        """Bytes of the client with the most, in both directions."""
        return max((self.up.get(name, 0) + size for name, size in self.down.items()), default=0)


@dataclass(frozen=True)
class PlannedRequest:
    """The weights in a request.

    Args:
        manifest: Their tensors.
        size: Bytes.
        differences: Number of packed differences; None if all weights are sent.
    """

    manifest: Manifest
    size: int
    differences: int | None


class PlannedDownlink:
    """Which versions clients have; the rules are those of ``communication/versions.py``.

    Args:
        config: The run.
        server: The server's state before round 1.
        initial: The tensors that clients can compute by themselves; with others, they do not have version 0.
    """

    def __init__(self, config: RunConfig, server: Server, initial: Manifest) -> None:
        self._settings, self._newest = config.compression.down, 0
        size = server.shared.size
        self._difference = packed_bytes(size, self._settings)
        sample, self._kept = None if self._settings.kind == "none" else _sample(self._settings), 0
        if sample is not None:
            wrapping = size_of(sample) - sum(array.nbytes for array in sample.arrays.values())
            self._kept = most_differences(payload_bytes(server.shared.manifest), self._difference + wrapping)
        self._held: dict[str, int] = {}
        self._first = 0 if server.shared.manifest == initial else -1

    def request(self, client: str, manifest: Manifest) -> PlannedRequest:
        """Return what a request of a client holds.

        Args:
            client: The client.
            manifest: The weights that it needs.
        """
        missing = self._newest - self._held.get(client, self._first)
        if self._settings.kind == "none" or not manifest.size or missing > min(self._kept, self._newest):
            return PlannedRequest(manifest, payload_bytes(manifest), None)
        return PlannedRequest(manifest, missing * self._difference, missing)

    def received(self, clients: Iterable[str]) -> None:
        """Record that clients have the newest version."""
        self._held |= dict.fromkeys(clients, self._newest)

    def trained(self, clients: Iterable[str], *, new: bool) -> None:
        """Record a round of training, which makes a new version if weights were sent."""
        self.received(clients)
        self._newest += new


class Encoded:
    """The encoded messages of one method's run.

    Args:
        model: The method on a base without weights.
    """

    def __init__(self, model: ClientModel) -> None:
        self.method, self.config = model.method, model.config

    def is_evaluated(self, number: int) -> bool:
        """Return whether a round is evaluated."""
        every = self.config.evaluation.every
        return self._is_last(number) or bool(every and number % every == 0)

    def _is_last(self, number: int) -> bool:
        return number == self.method.total_rounds(self.config.federation.rounds)

    def training(
        self,
        server: Server,
        number: int,
        requests: Mapping[str, PlannedRequest],
        replies: Mapping[str, Manifest],
        packed: Mapping[str, int],
        keys: Mapping[str, int],
    ) -> Messages:
        """Return the messages of a round of training.

        Args:
            server: The state before the round.
            number: The round.
            requests: Client -> the weights that it receives.
            replies: Client -> the tensors that it sends.
            packed: Client -> their bytes.
            keys: Client -> bytes that it receives for secure aggregation.
        """
        info, made, settings = self._info(server, number), Messages(), self.config.compression
        measures = {name: _NUMBER if name in ("loss", "rows") else _COUNT for name in told(self.config, MEASURES)}
        for name, wanted in requests.items():
            made.down[name] = self._request(info, wanted) + keys.get(name, 0)
        for name, manifest in replies.items():  # in buffered rounds, of fewer clients
            heading, payload = {"client": name, "round": number, "base": _HASH}, _hollow(manifest)
            sample = None if settings.kind == "none" else _sample(settings)
            made.up[name] = _around(records(heading, measures, payload, sample)) + packed[name]
        return made

    def evaluation(self, server: Server, requests: Mapping[str, PlannedRequest]) -> Messages:
        """Return the messages of an evaluation.

        Args:
            server: The state after the round.
            requests: Client -> the weights that it receives.
        """
        states = list(self.method.states)
        answers = self.config.evaluation.answers == "always" or self._is_last(server.round)
        pairs = self.config.training.objective == "dpo"
        info, made = self._info(server, server.round) | {"states": states, "answers": answers}, Messages()
        kinds = ["nll", *(["rouge_l"] if answers else []), *(REWARDS if pairs else ())]
        scores: dict[str, float | int] = {f"{kind}.{state}": _NUMBER for kind in kinds for state in states}
        scores |= dict.fromkeys((*answer_counts(states), "rows") if answers else ("rows",), _COUNT)
        for name, wanted in requests.items():
            made.down[name] = self._request(info, wanted)
            made.up[name] = encoded_bytes(records({"client": name, "round": server.round}, scores))
        return made

    def _info(self, server: Server, number: int) -> dict[str, object]:
        return {"run": _RUN, "round": number, "agreement": json.dumps(server.agreement)}

    def _request(self, info: Mapping[str, object], wanted: PlannedRequest) -> int:
        if wanted.differences is None:
            return _around(records(info, payload=_hollow(wanted.manifest))) + wanted.size
        packed = [_sample(self.config.compression.down, number) for number in range(wanted.differences)]
        return _around(difference_records(info, [_HASH] * (len(packed) + 1), packed)) + wanted.size


def _hollow(manifest: Manifest) -> Payload:
    """Return a payload with the names and shapes, and one value."""
    return Payload(manifest, np.ones(1, np.float32)) if manifest.size else Payload.empty()


def _sample(settings: CompressionConfig, number: int = 0) -> Packed:
    """Return the wrapping of packed values around a few bytes; those of another number are other ones.

    Equal arrays are sent once. In a run only empty ones are equal.
    """
    packed, random = pack(np.arange(1, 100, dtype=np.float32), settings), np.random.default_rng(number)
    arrays = {n: np.frombuffer(random.bytes(8 * its.nbytes), its.dtype) for n, its in packed.arrays.items()}
    return replace(packed, arrays=arrays)


def _around(content: Any) -> int:
    """Return the encoded bytes of a message, a ``RecordDict``, without its arrays' values."""
    arrays = [array.numpy() for record in content.array_records.values() for array in record.values()]
    values: int = sum(array.nbytes for array in arrays)
    return encoded_bytes(content) - values
