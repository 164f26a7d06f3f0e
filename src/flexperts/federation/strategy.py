"""The server's side of a round, as a Flower Strategy: broadcast, stream replies, evaluate."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import Update, info_of, metrics_of, records, vector_of
from flexperts.communication.traffic import encoded_bytes
from flexperts.config import RunConfig
from flexperts.errors import FederationError
from flexperts.federation.observer import Observer
from flexperts.methods.base import Method
from flexperts.parameters.vector import Manifest, Vector


@dataclass
class RoundLog:
    """What the server measures of one round.

    Args:
        number: The round, from 1.
        clients: What each client reported: loss, steps, tokens, rows.
        uplink: Encoded bytes that each client sent.
        downlink: Encoded bytes sent to each client.
        personal_sent: Personal bytes that clients found in their own encoded messages.
        scores: Client -> metrics of its evaluation, in rounds that evaluate.
        seconds: Wall time of training and evaluation.
    """

    number: int
    clients: dict[str, dict[str, float | int]] = field(default_factory=dict)
    uplink: dict[str, int] = field(default_factory=dict)
    downlink: dict[str, int] = field(default_factory=dict)
    personal_sent: int = 0
    scores: dict[str, dict[str, float | int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "evaluation": 0.0})


class FlexpertsStrategy(Strategy):
    """Runs any ``Method`` on Flower.

    Args:
        method: The method.
        config: The run.
        nodes: Node id -> client name.
        manifest: Names and shapes of the shared weights.
        vector: The shared weights that round 1 starts from.
        run: Where finished rounds are written.
        observer: Receives progress.
    """

    def __init__(
        self,
        method: Method,
        config: RunConfig,
        nodes: dict[int, str],
        manifest: Manifest,
        vector: Vector,
        run: RunDirectory,
        observer: Observer,
    ) -> None:
        self.method, self.config, self.manifest = method, config, manifest
        self.nodes = dict(sorted(nodes.items(), key=lambda item: item[1]))
        self.run, self.observer = run, observer
        self.rounds: list[RoundLog] = []
        self.vector = vector
        self._started = 0.0

    def seconds(self) -> dict[str, float]:
        """Return wall time by phase, over all rounds."""
        return {phase: sum(log.seconds[phase] for log in self.rounds) for phase in ("training", "evaluation")}

    def summary(self) -> None:
        """Say nothing: the observer shows the run."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield one request per client, sorted by client, each with records of its own."""
        self._started = time.monotonic()
        self.rounds.append(RoundLog(server_round))
        info = {"round": server_round, "manifest": self.manifest.digest}
        self.observer.stage(f"round {server_round} of {self.config.federation.rounds}")
        return self._requests("train", info, server_round, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stream the replies through the method's rule into the next shared weights."""
        self.vector = self.method.aggregate(self.vector, self._updates(replies))
        self.rounds[-1].seconds["training"] = time.monotonic() - self._started
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield one evaluation request per client in rounds that evaluate."""
        self._started = time.monotonic()
        every, last = self.config.evaluation.every, self.config.federation.rounds
        if server_round != last and not (every and server_round % every == 0):
            return iter(())
        info: dict[str, Any] = {"states": list(self.method.states), "manifest": self.manifest.digest}
        return self._requests("evaluate", info, server_round, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the clients' scores and write the round down."""
        log = self.rounds[-1]
        for reply in self._in_order(replies):
            log.scores[self._sender(reply)] = dict(metrics_of(reply))
        log.seconds["evaluation"] = time.monotonic() - self._started
        record = vars(log)
        self.run.append_round(record)
        self.observer.round(record)
        return None

    def _requests(self, kind: str, info: dict[str, Any], server_round: int, grid: Grid) -> Iterator[Message]:
        for node, name in self.nodes.items():
            content = records(info, vector=self.vector)
            if kind == "train":
                self.rounds[-1].downlink[name] = encoded_bytes(content)
            yield grid.create_message(content, kind, node, str(server_round))

    def _updates(self, replies: Iterable[Message]) -> Iterator[Update]:
        log = self.rounds[-1]
        for reply in self._in_order(replies):
            name = self._sender(reply)
            metrics = dict(metrics_of(reply))
            log.uplink[name] = encoded_bytes(reply.content)
            log.personal_sent += int(metrics.pop("personal_sent"))
            log.clients[name] = metrics
            yield Update(name, vector_of(reply, self.manifest.size, name), int(metrics["rows"]), metrics)

    def _in_order(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Return replies sorted by client; a lazy grid has them in the order of the requests, which is the same."""
        return sorted(replies, key=self._sender) if isinstance(replies, list | tuple) else replies

    def _sender(self, reply: Message) -> str:
        if reply.has_error():
            raise FederationError(
                f"a client's reply is an error: {reply.error.reason}",
                "every client must answer",
                "see that silo's log",
            )
        name = self.nodes[reply.metadata.src_node_id]
        if info_of(reply)["client"] != name:
            raise FederationError(
                f"node of {name} answers as {info_of(reply)['client']}",
                "a node is one client",
                "check node configs",
            )
        return name
