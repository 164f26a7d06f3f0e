"""The server's side of a round, as a Flower Strategy: broadcast, stream replies, evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import Update, info_of, metrics_of, payload_of, records
from flexperts.communication.traffic import encoded_bytes, group_bytes, payload_bytes
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.federation.checkpoint import save_server
from flexperts.federation.observer import Observer
from flexperts.federation.reduction import reduced
from flexperts.methods.base import Method
from flexperts.methods.server import Server
from flexperts.parameters.vector import Manifest
from flexperts.seeding import generator


@dataclass
class RoundLog:
    """What the server measures of one round.

    Args:
        number: The round, from 1.
        clients: What each client reported: loss, steps, tokens, rows.
        uplink: Encoded bytes that each client sent.
        downlink: Encoded bytes sent to each client.
        declared: What the method declares for both directions: payload bytes by client.
        groups: The same, divided by group of tensors.
        evaluation: Encoded bytes of the evaluation, both directions, by client.
        personal_sent: Personal bytes that clients found in their own encoded messages.
        scores: Client -> metrics of its evaluation, in rounds that evaluate.
        seconds: Wall time of training and evaluation.
    """

    number: int
    clients: dict[str, dict[str, float | int]] = field(default_factory=dict)
    uplink: dict[str, int] = field(default_factory=dict)
    downlink: dict[str, int] = field(default_factory=dict)
    declared: dict[str, dict[str, int]] = field(default_factory=lambda: {"uplink": {}, "downlink": {}})
    groups: dict[str, dict[str, dict[str, int]]] = field(default_factory=lambda: {"uplink": {}, "downlink": {}})
    evaluation: dict[str, dict[str, int]] = field(default_factory=lambda: {"uplink": {}, "downlink": {}})
    personal_sent: int = 0
    scores: dict[str, dict[str, float | int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "evaluation": 0.0})

    def declare(self, direction: str, client: str, manifest: Manifest) -> None:
        """Note what a client's payload holds."""
        self.groups[direction][client] = group_bytes(manifest)
        self.declared[direction][client] = payload_bytes(manifest)


class FlexpertsStrategy(Strategy):
    """Runs any ``Method`` on Flower.

    Args:
        method: The method.
        config: The run.
        nodes: Node id -> client name.
        server: The state that the rounds start from.
        run: Where finished rounds are written.
        observer: Receives progress.
        finished: Rounds that were done before, when a run is resumed.
    """

    def __init__(
        self,
        method: Method,
        config: RunConfig,
        nodes: dict[int, str],
        server: Server,
        run: RunDirectory,
        observer: Observer,
        finished: Sequence[RoundLog] = (),
    ) -> None:
        self.method, self.config, self.server = method, config, server
        self.nodes = dict(sorted(nodes.items(), key=lambda item: item[1]))
        self.run, self.observer = run, observer
        self.rounds: list[RoundLog] = list(finished)
        self.rounds_total = config.federation.rounds + method.extra_rounds(config.federation.rounds)
        self._started = 0.0

    def seconds(self) -> dict[str, float]:
        """Return wall time by phase, over all rounds."""
        return {phase: sum(log.seconds[phase] for log in self.rounds) for phase in ("training", "evaluation")}

    def summary(self) -> None:
        """Say nothing: the observer shows the run."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield one request per participant, sorted by client, each with records of its own."""
        self._started = time.monotonic()
        self.rounds.append(RoundLog(self.server.round + 1))
        self.observer.stage(f"round {self.server.round + 1} of {self.rounds_total}")
        return self._train_requests(grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stream the replies through the method's rule into the server's next state."""
        updates = reduced(self.config, self.server.shared, self._updates(replies))
        self.method.aggregate(self.server, updates)
        self.server.round += 1
        self.rounds[-1].seconds["training"] = time.monotonic() - self._started
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield one evaluation request per client in rounds that evaluate."""
        self._started = time.monotonic()
        every = self.config.evaluation.every
        if self.server.round != self.rounds_total and not (every and self.server.round % every == 0):
            return iter(())
        return self._evaluate_requests(grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the clients' scores and write the round down."""
        log = self.rounds[-1]
        for reply in self._in_order(replies):
            name = self._sender(reply)
            log.scores[name] = dict(metrics_of(reply.content))
            log.evaluation["uplink"][name] = encoded_bytes(reply.content)
        log.seconds["evaluation"] = time.monotonic() - self._started
        record = vars(log)
        self.run.append_round(record)
        save_server(self.run.checkpoint, self.server)
        self.observer.round(record)
        return None

    def _participants(self) -> list[str]:
        """Return who trains in the coming round, sorted."""
        clients = list(self.nodes.values())
        count = max(1, round(self.config.federation.participation * len(clients)))
        stream = generator(self.config.seed, "participants", self.server.round + 1)
        drawn = torch.randperm(len(clients), generator=stream)[:count].tolist()
        return sorted(self.method.participants(self.server, sorted(clients[i] for i in drawn)))

    def _train_requests(self, grid: Grid) -> Iterator[Message]:
        log = self.rounds[-1]
        participants = set(self._participants())
        for node, name in self.nodes.items():
            if name in participants:
                payload = self.method.broadcast(self.server, name)
                content = records(self._info(self.server.round + 1), payload=payload)
                log.downlink[name] = encoded_bytes(content)
                log.declare("downlink", name, payload.manifest)
                yield grid.create_message(content, "train", node, str(log.number))

    def _evaluate_requests(self, grid: Grid) -> Iterator[Message]:
        for node, name in self.nodes.items():
            info = self._info(self.server.round) | {"states": list(self.method.states), "answers": self._answers()}
            content = records(info, payload=self.method.final(self.server, name))
            self.rounds[-1].evaluation["downlink"][name] = encoded_bytes(content)
            yield grid.create_message(content, "evaluate", node, str(self.server.round))

    def _answers(self) -> bool:
        """Tell whether this round's evaluation generates answers."""
        return self.config.evaluation.answers == "always" or self.server.round == self.rounds_total

    def _info(self, number: int) -> dict[str, Any]:
        return {"round": number, "agreement": json.dumps(self.server.agreement)}

    def _updates(self, replies: Iterable[Message]) -> Iterator[Update]:
        log = self.rounds[-1]
        for reply in self._in_order(replies):
            name = self._sender(reply)
            metrics = dict(metrics_of(reply.content))
            expected = self.method.uplink(self.server, name)
            log.uplink[name] = encoded_bytes(reply.content)
            log.declare("uplink", name, expected)
            log.personal_sent += int(metrics.pop("personal_sent"))
            log.clients[name] = metrics
            yield Update(
                name,
                payload_of(reply.content, name, self.server.shared).check(expected, name),
                int(metrics["rows"]),
                metrics,
            )

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
        if info_of(reply.content)["client"] != name:
            raise FederationError(
                f"node of {name} answers as {info_of(reply.content)['client']}",
                "a node is one client",
                "check node configs",
            )
        return name
