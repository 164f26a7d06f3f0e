"""The server's run over any Flower Grid: gather clients, run the rounds, write the result. It loads no model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.adapter_folder import write_adapter
from flexperts.communication.average import check_finite
from flexperts.communication.messages import (
    Update,
    check_records,
    fields_of,
    payload_of,
    records,
)
from flexperts.communication.schema import InitialFields, NoNumbers, check_size, checked, table_of
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.federation import FederationConfig
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError, FlexpertsError, incompatible, one_line
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.observer import Observer, Once
from flexperts.parameters.vector import Payload
from flexperts.protection.pipeline import check_enough, check_protections
from flexperts.server.checkpoint import load_server, save_server
from flexperts.server.enrolment import enrol_fitting, found, gather, require, without_misfits
from flexperts.server.exchange import error_of, request, sendable
from flexperts.server.membership import Membership
from flexperts.server.round_log import RoundLog
from flexperts.server.strategy import FlexpertsStrategy
from flexperts.server.summary import summarize


@dataclass(frozen=True)
class Initial:
    """The initial weights that one client sends before round 1.

    Args:
        payload: The shared weights that all clients start from.
        split: The table of the client's parameters: shared, personal, frozen.
        adapter: PEFT's configuration of the adapter, as JSON.
        size: Encoded bytes of the message.
    """

    payload: Payload
    split: Any
    adapter: str
    size: int


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
    method, members = make_method(config.method), Membership(observer, run.run_id)
    method.check(config)
    check_protections(method, config)
    observer.stage(f"{config.method.name}: clients join")
    server, initial = _joined(grid, config, run, method, members)
    observer.split(method.name, initial.split)
    setup = time.monotonic() - started
    finished = [RoundLog(**record) for record in run.keep_rounds(server.round)]
    save_server(run.checkpoint, server)
    strategy = FlexpertsStrategy(method, config, members, server, run, observer, finished)
    left = strategy.rounds_total - server.round
    strategy.start(grid, ArrayRecord(), num_rounds=left, timeout=config.federation.deadline)
    write_adapter(run.shared, initial.adapter, method.adapter(server))
    total = time.monotonic() - started + sum(sum(log.seconds.values()) for log in finished)
    seconds = {"setup": setup, **strategy.seconds(), "total": total}
    summary = summarize(config, strategy.rounds, seconds, server.base, server.clients)
    summary["bytes"]["join_total"] = sum(one.size for one in members.told.values()) + initial.size
    run.write_summary(amend(summary))


def _joined(
    grid: Grid, config: RunConfig, run: RunDirectory, method: Method, members: Membership
) -> tuple[Server, Initial]:
    """Wait for clients, and return the state that the rounds start from, with one client's initial weights.

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
    server.base = gather(grid, members, federation, server.base)
    if resumed:
        enrol_fitting(method, server, members, members.online)
    else:
        found(method, members, server)
        check_enough(config, len(server.clients))
    require(members, federation)
    initial = ask_initial(grid, members, server, federation)
    if resumed:
        members.observer.stage(f"resuming after round {server.round}")
    else:
        server.shared = initial.payload
        without_misfits(method, members, server)
        require(members, federation)
        check_enough(config, len(server.clients))
        method.start(server)
    return server, initial


def ask_initial(grid: Grid, members: Membership, server: Server, federation: FederationConfig) -> Initial:
    """Return the initial shared weights of the first client, by name, that sends usable ones.

    One client is enough: all draw the same weights from the run's seed.
    """
    faults = []
    for name in members.online:
        content = records({"run": members.run, "agreement": json.dumps(server.agreement)})
        asked = request(content, "query.initial", members.node(name), "join")
        replies = list(grid.send_and_receive(sendable(grid, iter([asked])), timeout=federation.deadline))
        try:
            return _read_initial(name, replies, federation)
        except FederationError as error:
            faults.append(one_line(str(error)))
            members.observer.refused(name, faults[-1])
    raise FederationError(
        f"no client sent initial weights ({', '.join(faults)})",
        "at least one client must",
        "see the silos' logs, fix the cause there, and resume the run",
    )


def _read_initial(name: str, replies: list[Message], federation: FederationConfig) -> Initial:
    if not replies:
        raise FederationError(f"{name} sent no initial weights", "it did not answer in time", "see that silo's log")
    if (error := error_of(replies[0])) is not None:
        raise FederationError(f"{name} answers with an error", error, "see that silo's log")
    content, most = replies[0].content, federation.max_message_bytes
    remedy = "raise federation.max_message_bytes if this run's messages are larger"
    try:
        check_size(content, most, name, remedy)
        check_records(content, name, "info", "metrics")
        fields = fields_of(content, InitialFields, name)
        checked(NoNumbers, content.metric_records.get("metrics", {}), name)
        split = table_of(fields.split, name)
        payload = payload_of(content, name)
        check_finite(Update(name, payload, 1, {}))
        payload = replace(payload, vector=payload.vector.copy())  # it outlives the message
        return Initial(payload, split, fields.adapter, encoded_bytes(content))
    except FlexpertsError as fault:
        raise FederationError(f"{name}'s initial weights", f"{fault.value}: {fault.rule}", fault.remedy) from fault
    except Exception as fault:  # another machine's bytes
        raise incompatible(f"{name}'s initial weights", f"they cannot be read ({fault!r})") from fault
