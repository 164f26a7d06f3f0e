"""The server's run over any Flower Grid: gather clients, run the rounds, write the result. It loads no model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.adapter_folder import adapter_config, write_adapter
from flexperts.communication.versions import Versions
from flexperts.config.run import RunConfig
from flexperts.errors import FlexpertsError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.observer import Observer, Once
from flexperts.parameters.vector import Payload
from flexperts.protection.pipeline import check_apart, check_enough, checked_method
from flexperts.server.checkpoint import load_server, save_server
from flexperts.server.enrolment import check_report, enrol_fitting, found, gather, require
from flexperts.server.exchange import LazyGrid
from flexperts.server.membership import Membership
from flexperts.server.round_log import RoundLog
from flexperts.server.start import Initial, agreed_start
from flexperts.server.strategy import FlexpertsStrategy
from flexperts.server.summary import summarize


def serve(
    grid: Grid,
    config: RunConfig,
    run: RunDirectory,
    observer: Observer,
    amend: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Run a method's rounds over a grid and write rounds, shared adapter and, last, the summary.

    If the run directory holds a checkpoint, the run resumes after its last finished round, with the clients that
    are online.

    Args:
        grid: Where the clients are.
        config: The run.
        run: Its directory.
        observer: Receives progress.
        amend: Adds to the summary what only the caller knows, before it is written.
    """
    started, observer = time.monotonic(), Once(observer)
    method, members = checked_method(config), Membership(observer, run.run_id)
    if not isinstance(grid, LazyGrid):
        check_apart(config)
    if method.personal_once and config.training.personal_moments == "kept":
        observer.notice(
            f"training.personal_moments = 'kept' has no effect: {method.name} trains what is personal in one round"
        )
    observer.stage(f"{config.method.name}: clients join")
    server, initial = joined(grid, config, run, method, members)
    observer.split(method.name, initial.split)
    setup = time.monotonic() - started
    finished = [RoundLog(**record) for record in run.keep_rounds(server.round)]
    save_server(run.checkpoint, server)
    strategy = FlexpertsStrategy(method, config, members, server, run, observer, finished)
    left = strategy.rounds_total - server.round
    strategy.start(grid, ArrayRecord(), num_rounds=left, timeout=config.federation.deadline)
    finish(config, run, strategy, setup, initial.size, amend)


def finish(
    config: RunConfig,
    run: RunDirectory,
    strategy: FlexpertsStrategy,
    setup: float,
    initial: int,
    amend: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Write the shared adapter and, last, the summary.

    Args:
        config: The run.
        run: Its directory.
        strategy: Its finished rounds.
        setup: Seconds before the rounds.
        initial: Encoded bytes of the initial weights.
        amend: See ``serve``.
    """
    server = strategy.server
    adapter = strategy.method.adapter(server)
    write_adapter(run.shared, adapter_config(config, adapter), adapter)
    summary = summarize(config, strategy.rounds, strategy.seconds(setup), server.base, server.clients)
    summary["bytes"]["join_total"] = sum(one.size for one in strategy.members.told.values()) + initial
    run.write_summary(amend(summary))


def joined(
    grid: Grid, config: RunConfig, run: RunDirectory, method: Method, members: Membership
) -> tuple[Server, Initial]:
    """Wait for clients, and return the state that the rounds start from, with the agreed initial weights.

    A new run has the clients that are online, and takes the initial weights. A resumed run keeps the weights of its
    checkpoint, and adds the clients that are online, known or new.
    """
    federation, resumed = config.federation, run.checkpoint.exists()
    if resumed:
        server = load_server(run.checkpoint)
        fewest = min(federation.min_clients, len(server.clients))  # some may have been forgotten
        federation = federation.model_copy(update={"min_clients": fewest})
    else:
        server = Server(Payload.empty(), {}, seed=config.seed)
    members.owners, server.rounds = server.nodes, federation.rounds
    if not isinstance(grid, LazyGrid):  # in one process, no client reports its own rows
        server.max_share = federation.max_share
    server.base = gather(grid, members, federation, server.base)
    if resumed:
        initial = agreed_start(grid, members, server, federation)
        enrol_fitting(method, server, members, members.arrived)
        require(members, federation)
        members.observer.stage(f"resuming after round {server.round}")
        return server, initial
    initial = _begun(grid, config, method, members, server)
    for name in members.online:
        members.bind(name)
    return server, initial


def _begun(grid: Grid, config: RunConfig, method: Method, members: Membership, server: Server) -> Initial:
    """Set up a new run's state, and start again without the clients that are turned away on the way."""
    initial, agreement = None, None
    while True:
        found(method, members, server)
        check_enough(config, len(server.clients))
        require(members, config.federation)
        if initial is None or server.agreement != agreement:  # it decides what clients start from
            server.start, agreement = "", server.agreement
            initial = agreed_start(grid, members, server, config.federation)
        server.shared, server.memory = initial.payload, {}
        if config.compression.downlink != "none":
            server.versions = Versions([initial.payload.digest()])
        method.start(server)
        for name in sorted(set(members.online) & server.clients.keys()):
            try:
                check_report(method, server, name)
            except FlexpertsError as error:
                members.turn_away(name, str(error))
        if members.online == sorted(server.clients):
            for name in sorted(set(method.named_clients()) - server.clients.keys()):
                members.observer.notice(f"method.options names {name}, which has not joined")
            return initial
