"""The start of a run: the initial weights and the split that most clients report.

Every client computes the same start from recipe, base and agreement, and reports its digest. The digest of most is
the run's. A client that reports another one, or sends weights of another digest, is turned away.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from flexperts.communication.average import check_finite
from flexperts.communication.messages import Update, info_of, payload_of, records
from flexperts.communication.traffic import encoded_bytes
from flexperts.errors import FederationError, FlexpertsError, incompatible
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server.exchange import Asked, LazyGrid, error_of, one_line, request, sendable
from flexperts.server.membership import Membership


@dataclass(frozen=True)
class Initial:
    """The initial weights that one client sends before round 1.

    Args:
        payload: The shared weights that all clients start from.
        split: The table of the client's parameters: shared, personal, frozen.
        digest: Digest of both.
        size: Encoded bytes of the message.
    """

    payload: Payload
    split: Any
    digest: str
    size: int


def agreed_start(grid: Grid, members: Membership, server: Server, deadline: float) -> Initial:
    """Return the initial weights that most clients report; those that report others are turned away.

    In one process all clients are the same code, so the first one's weights are taken.

    Args:
        grid: The grid of nodes.
        members: The clients that are online.
        server: The run's state; its ``start`` is set, or is compared with if it is known.
        deadline: Seconds to wait for each exchange.
    """
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
            initial = _read_initial(name, replies)
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
    if (told := error_of(reply)) is not None:
        raise FederationError(f"{name} answers with an error", told, "see that silo's log")
    try:
        info = info_of(reply.content)
        digest, _ = str(info["digest"]), json.loads(str(info["split"]))
    except Exception as error:  # another machine's bytes
        raise _unreadable(name, error) from error
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise _unreadable(name, ValueError("its digest is not one"))
    return digest


def _read_initial(name: str, replies: list[Message]) -> Initial:
    if not replies:
        raise FederationError(f"{name} sent no initial weights", "it did not answer in time", "see that silo's log")
    if (told := error_of(replies[0])) is not None:
        raise FederationError(f"{name} answers with an error", told, "see that silo's log")
    content = replies[0].content
    try:
        payload, split = payload_of(content, name), str(info_of(content)["split"])
        check_finite(Update(name, payload, 1, {}))
        payload = replace(payload, vector=payload.vector.copy())  # it outlives the message
        return Initial(payload, json.loads(split), payload.digest(split), encoded_bytes(content))
    except FederationError:
        raise
    except Exception as error:  # another machine's bytes
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> FederationError:
    said = str(error) if isinstance(error, FlexpertsError) else repr(error)
    return incompatible(f"{name}'s initial weights", f"they cannot be read ({said})")
