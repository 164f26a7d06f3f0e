"""The server's run over any Flower Grid: meet the clients, run the rounds, write the result. It loads no model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import Info, info_of, payload_of, records
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.federation.adapter import write_adapter
from flexperts.federation.checkpoint import load_server, save_server
from flexperts.federation.observer import Observer
from flexperts.federation.strategy import FlexpertsStrategy, RoundLog
from flexperts.federation.summary import summarize
from flexperts.methods.base import Method
from flexperts.methods.registry import make_method
from flexperts.methods.server import Server


@dataclass(frozen=True)
class Federation:
    """The clients of a run, met.

    Args:
        nodes: Node id -> client name.
        infos: Client name -> what it told about itself.
        sent: Client name -> encoded bytes that it sent in joining.
    """

    nodes: dict[int, str]
    infos: dict[str, Info]
    sent: dict[str, int]

    @property
    def base(self) -> str:
        """Fingerprint of the base that all of them have."""
        return str(next(iter(self.infos.values()))["base"])


def serve(grid: Grid, config: RunConfig, run: RunDirectory, observer: Observer) -> None:
    """Run a method's rounds over a grid and write rounds, shared adapter and summary.

    A run directory that holds a checkpoint is taken up after its last finished round.

    Raises:
        FederationError: Clients disagree on the base, or a reply cannot be used.
    """
    started = time.monotonic()
    method = make_method(config.method)
    observer.stage(f"{config.method.name}: clients join")
    federation = meet(grid)
    method.check_clients(federation.infos)
    server, texts = open_server(grid, method, federation, config)
    if run.checkpoint.exists():
        server = load_server(run.checkpoint, federation.infos)
        observer.stage(f"resuming after round {server.round}")
    observer.split(config.method.name, json.loads(texts["split"]))
    setup = time.monotonic() - started
    finished = [RoundLog(**record) for record in run.keep_rounds(server.round)]
    before = sum(sum(log.seconds.values()) for log in finished)
    strategy = FlexpertsStrategy(method, config, federation.nodes, server, run, observer, finished)
    save_server(run.checkpoint, server)
    strategy.start(grid, ArrayRecord(), num_rounds=strategy.rounds_total - server.round)
    write_adapter(run.shared, texts["adapter"], method.adapter(server))
    seconds = {"setup": setup, **strategy.seconds(), "total": time.monotonic() - started + before}
    summary = summarize(config, strategy.rounds, seconds, federation.base, server.clients)
    summary["bytes"]["join_total"] = sum(federation.sent.values())
    run.write_summary(summary)


def meet(grid: Grid) -> Federation:
    """Ask every node who it is.

    Raises:
        FederationError: Two nodes have one name, or clients disagree on the base.
    """
    requests = (grid.create_message(records({}), "query.join", n, "join") for n in sorted(grid.get_node_ids()))
    nodes: dict[int, str] = {}
    infos: dict[str, Info] = {}
    sent: dict[str, int] = {}
    for reply in grid.send_and_receive(requests, timeout=None):
        info = _joined(reply, infos)
        name = str(info["client"])
        nodes[reply.metadata.src_node_id], infos[name], sent[name] = name, info, encoded_bytes(reply.content)
    return Federation(nodes, dict(sorted(infos.items())), sent)


def open_server(
    grid: Grid, method: Method, federation: Federation, config: RunConfig
) -> tuple[Server, Mapping[str, str]]:
    """Return the server's state before round 1, and the texts that describe the shared part.

    The first client supplies the initial shared weights: all draw the same.
    """
    reports = {name: json.loads(str(info["report"])) for name, info in federation.infos.items()}
    agreement = method.agree(reports)
    node = min(federation.nodes, key=lambda n: federation.nodes[n])
    request = grid.create_message(records({"agreement": json.dumps(agreement)}), "query.initial", node, "join")
    (reply,) = grid.send_and_receive([request], timeout=None)
    _answered(reply)
    info: Any = info_of(reply.content)
    clients = {name: int(i["train_rows"]) for name, i in federation.infos.items()}
    federation.sent[federation.nodes[node]] += encoded_bytes(reply.content)
    payload = payload_of(reply.content, federation.nodes[node])
    server = Server(payload, clients, reports, agreement, seed=config.seed)
    method.start(server)
    return server, info


def _joined(reply: Message, others: dict[str, Info]) -> Info:
    """Check one client's introduction against those before it."""
    _answered(reply)
    info = info_of(reply.content)
    if info["client"] in others:
        raise FederationError(f"two nodes say they are {info['client']}", "client names differ", "rename one")
    first: Any = next(iter(others.values()), info)
    if info["base"] != first["base"]:
        raise FederationError(
            f"the base of {info['client']} differs from that of {first['client']}",
            "all clients start from one base",
            "install the same base on every silo",
        )
    return info


def _answered(reply: Message) -> None:
    if reply.has_error():
        raise FederationError(f"a client cannot join: {reply.error.reason}", "all must join", "see that silo's log")
