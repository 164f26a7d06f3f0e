"""The server's run over any Flower Grid: meet the clients, run the rounds, write the result. It loads no model."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import Info, info_of, records, vector_of
from flexperts.config import RunConfig
from flexperts.errors import FederationError
from flexperts.federation.adapter import write_adapter
from flexperts.federation.observer import Observer
from flexperts.federation.strategy import FlexpertsStrategy
from flexperts.federation.summary import summarize
from flexperts.methods.registry import method_class
from flexperts.parameters.vector import Manifest, Vector

_MUST_AGREE = ("base", "manifest", "adapter")


@dataclass(frozen=True)
class Federation:
    """The clients of a run, met.

    Args:
        nodes: Node id -> client name.
        infos: Client name -> what it told about itself.
        manifest: Names and shapes of the shared weights.
        initial: The shared weights that round 1 starts from.
    """

    nodes: dict[int, str]
    infos: dict[str, Info]
    manifest: Manifest
    initial: Vector


def serve(grid: Grid, config: RunConfig, run: RunDirectory, observer: Observer) -> None:
    """Run a method's rounds over a grid and write rounds, shared adapter and summary.

    Raises:
        FederationError: Clients disagree on base or recipe, or a reply cannot be used.
    """
    started = time.monotonic()
    observer.stage(f"{config.method.name}: clients join")
    federation = meet(grid)
    setup = time.monotonic() - started
    info = next(iter(federation.infos.values()))
    observer.split(config.method.name, json.loads(str(info["split"])))
    strategy = FlexpertsStrategy(
        method_class(config.method.name)(),
        config,
        federation.nodes,
        federation.manifest,
        federation.initial,
        run,
        observer,
    )
    strategy.start(grid, ArrayRecord(), num_rounds=config.federation.rounds)
    write_adapter(run.shared, str(info["adapter"]), federation.manifest, strategy.vector)
    seconds = {"setup": setup, **strategy.seconds(), "total": time.monotonic() - started}
    run.write_summary(summarize(config, strategy.rounds, seconds, str(info["base"])))


def meet(grid: Grid) -> Federation:
    """Ask every node who it is; the first one also supplies the initial shared weights.

    Raises:
        FederationError: Two nodes have one name, or clients disagree on base, shared weights or adapter.
    """
    node_ids = sorted(grid.get_node_ids())
    requests = (_join_request(grid, node, send_initial=node == node_ids[0]) for node in node_ids)
    nodes: dict[int, str] = {}
    infos: dict[str, Info] = {}
    initial: Vector = np.zeros(0, dtype=np.float32)
    for reply in grid.send_and_receive(requests, timeout=None):
        info = _joined(reply, infos)
        name, node = str(info["client"]), reply.metadata.src_node_id
        nodes[node], infos[name] = name, info
        if node == node_ids[0]:
            initial = vector_of(reply, Manifest.from_json(str(info["manifest"])).size, name)
    first = next(iter(infos.values()))
    return Federation(nodes, dict(sorted(infos.items())), Manifest.from_json(str(first["manifest"])), initial)


def _join_request(grid: Grid, node: int, *, send_initial: bool) -> Message:
    return grid.create_message(records({"send_initial": int(send_initial)}), "query.join", node, "join")


def _joined(reply: Message, others: dict[str, Info]) -> Info:
    """Check one client's introduction against those before it."""
    if reply.has_error():
        raise FederationError(f"a client cannot join: {reply.error.reason}", "all must join", "see that silo's log")
    info = info_of(reply)
    if info["client"] in others:
        raise FederationError(f"two nodes say they are {info['client']}", "client names differ", "rename one")
    first: Any = next(iter(others.values()), info)
    for key in _MUST_AGREE:
        if info[key] != first[key]:
            raise FederationError(
                f"{key} of {info['client']} differs from that of {first['client']}",
                "all clients start from one base and one recipe",
                "install the same base and flexperts version on every silo",
            )
    return info
