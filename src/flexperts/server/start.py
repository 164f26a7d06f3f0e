"""The start of a run: the initial weights and the split that most clients report.

Every client computes the same start from recipe, base and agreement, and reports its digest. The digest of most is
the run's. A client that reports another one, or sends weights of another digest, is turned away.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flexperts.communication.average import check_finite
from flexperts.communication.messages import Update, check_records, fields_of, payload_of, records
from flexperts.communication.schema import ROOM, InitialFields, NoNumbers, check_size, checked, table_of
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.federation import FederationConfig
from flexperts.errors import FederationError, FlexpertsError, incompatible, one_line
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server.exchange import Asked, LazyGrid, check_no_error, error_of, request, sendable
from flexperts.server.membership import Membership


@dataclass(frozen=True)
class Initial:
    """The initial weights that one client sends before round 1.

    Args:
        payload: The shared weights that all clients start from.
        split: The table of the client's parameters: shared, personal, frozen.
        text: The same as it was sent, JSON.
        digest: Digest of both.
        size: Encoded bytes of the message.
    """

    payload: Payload
    split: Any
    text: str
    digest: str
    size: int


def agreed_start(grid: Grid, members: Membership, server: Server, federation: FederationConfig) -> Initial:
    """Return the initial weights that most clients report; those that report others are turned away.

    In one process all clients are the same code, so the first one's weights are taken.

    Args:
        grid: The grid of nodes.
        members: The clients that are online.
        server: The run's state; its ``start`` is set, or is compared with if it is known.
        federation: How long to wait for each exchange, and the largest message to read.
    """
    deadline = federation.deadline
    faults: list[str] = []
    alone = isinstance(grid, LazyGrid)
    if alone:
        names = members.online
    else:
        told, silent = _digests(grid, members, server, members.online, deadline, faults)
        server.start = server.start or _of_most(told, len(told) + silent)
        _turn_away_others(members, told, server.start)
        names = sorted(name for name, digest in told.items() if digest == server.start)
    for name in names:
        messages = [request(_question(members, server, weights=True), "query.initial", members.node(name), "join")]
        replies = list(grid.send_and_receive(sendable(grid, iter(messages)), timeout=deadline))
        try:
            initial = _read_initial(name, replies, federation.max_message_bytes)
            if not alone and initial.digest != server.start:
                raise _other_start(name, initial.digest, server.start)
        except FederationError as error:
            faults.append(one_line(str(error)))
            _set_aside(members, name, faults[-1], for_good=bool(replies) and error_of(replies[0]) is None)
        else:
            server.start = initial.digest
            return initial
    raise FederationError(
        f"no client sent initial weights ({', '.join(faults)})",
        "at least one client must",
        "see the silos' logs, fix the cause there, and resume the run",
    )


def check_start(grid: Grid, members: Membership, server: Server, names: Iterable[str], deadline: float) -> None:
    """Turn away those of some clients, online since a moment ago, that report another start than the run's."""
    newcomers = sorted(names)
    if server.start and newcomers and not isinstance(grid, LazyGrid):
        told, _ = _digests(grid, members, server, newcomers, deadline, [])
        _turn_away_others(members, told, server.start)


def _digests(
    grid: Grid, members: Membership, server: Server, names: Iterable[str], deadline: float, faults: list[str]
) -> tuple[dict[str, str], int]:
    """Ask clients for the digest of their start; return the digests, and how many clients did not answer in time.

    A client that sends something else is turned away; one that does not answer is only named, as it may be slow.
    """
    asked, told, silent = Asked(), dict[str, str](), set(names)
    content = [(name, _question(members, server, weights=False)) for name in sorted(silent)]
    messages = (asked.note(request(each, "query.initial", members.node(name), "join")) for name, each in content)
    for reply in grid.send_and_receive(sendable(grid, messages), timeout=deadline):
        name = members.nodes.get(asked.node(reply), "")
        if name not in silent:
            continue  # it was not asked, or has answered already
        silent.remove(name)
        try:
            told[name] = _read_digest(name, reply)
        except FederationError as error:
            faults.append(one_line(str(error)))
            _set_aside(members, name, faults[-1], for_good=error_of(reply) is None)
    for name in sorted(silent):
        faults.append(f"{name} sent no initial weights: it did not answer in time; see that silo's log")
        _set_aside(members, name, faults[-1], for_good=False)
    return told, len(silent)


def _question(members: Membership, server: Server, *, weights: bool) -> Any:
    return records({"run": members.run, "agreement": json.dumps(server.agreement), "weights": weights})


def _of_most(told: dict[str, str], clients: int) -> str:
    """Return the digest that more than half of the clients reported; those that were silent count, too."""
    if not told:
        return ""
    digest, votes = Counter(told.values()).most_common(1)[0]
    if 2 * votes <= clients:
        raise FederationError(
            f"initial weights and split of {clients} silos: "
            f"{', '.join(f'{name} has {its[:16]}' for name, its in sorted(told.items()))}",
            "more than half of the silos must have the same",
            "install one flexperts version with one base on every silo, leave out the silos that differ or do not "
            "answer, and start again",
        )
    return digest


def _turn_away_others(members: Membership, told: dict[str, str], start: str) -> None:
    for name, digest in sorted(told.items()):
        if digest != start:
            members.turn_away(name, str(_other_start(name, digest, start)))


def _set_aside(members: Membership, name: str, reason: str, *, for_good: bool) -> None:
    """Turn a client away, or only name it."""
    if for_good:
        members.turn_away(name, reason)
    else:
        members.observer.refused(name, reason)


def _other_start(name: str, digest: str, start: str) -> FederationError:
    return FederationError(
        f"{name} has the initial weights and split {digest[:16]}",
        f"the run's are {start[:16]}",
        "install the same flexperts version and base on every silo",
    )


def _read_digest(name: str, reply: Message) -> str:
    with _reading(name, reply):
        check_size(reply.content, ROOM, name)
        fields, _ = _texts(name, reply.content)
        payload_of(reply.content, name).check(Payload.empty().manifest, name)
    return fields.digest


def _read_initial(name: str, replies: list[Message], most: int) -> Initial:
    if not replies:
        raise FederationError(f"{name} sent no initial weights", "it did not answer in time", "see that silo's log")
    with _reading(name, replies[0]):
        content = replies[0].content
        check_size(content, most, name, "raise federation.max_message_bytes if this run's messages are larger")
        fields, split = _texts(name, content)
        payload = payload_of(content, name)
        check_finite(Update(name, payload, 1, {}))
        payload = replace(payload, vector=payload.vector.copy())  # it outlives the message
    return Initial(payload, split, fields.split, payload.digest(fields.split), encoded_bytes(content))


@contextmanager
def _reading(name: str, reply: Message) -> Iterator[None]:
    """Refuse an error reply, and turn whatever is wrong with a reply into an error that names the client."""
    check_no_error(name, reply)
    try:
        yield
    except FlexpertsError as fault:
        raise FederationError(f"{name}'s initial weights", f"{fault.value}: {fault.rule}", fault.remedy) from fault
    except Exception as fault:  # another machine's bytes
        raise incompatible(f"{name}'s initial weights", f"they cannot be read ({fault!r})") from fault


def _texts(name: str, content: RecordDict) -> tuple[InitialFields, Any]:
    """Return the texts of a message, and the parameter table in them."""
    check_records(content, name, "info", "metrics")
    checked(NoNumbers, content.metric_records.get("metrics", {}), name)
    fields = fields_of(content, InitialFields, name)
    return fields, table_of(fields.split, name)
