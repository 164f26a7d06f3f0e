"""The members of the federation: each node's client, and what each client sent on joining."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from flexperts.communication.messages import (
    check_records,
    fields_of,
    info_of,
    payload_of,
    records,
)
from flexperts.communication.schema import LONGEST_NAME, LONGEST_TEXT, ROOM, Joining, NoNumbers, check_size, checked
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.names import alike, client_name, readings_of, skeletons
from flexperts.errors import FederationError, FlexpertsError, incompatible, one_line
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload
from flexperts.server.exchange import Asked, error_of, request, sendable


@dataclass(frozen=True)
class Introduction:
    """The message of a client that joins.

    Args:
        client: Its name.
        base: Fingerprint of its base.
        rows: Its train rows.
        report: The value of the method's ``report``.
        size: Encoded bytes of the message.
        card: Its keys for secure aggregation, as JSON; empty without.
        silos: Silos of a region; 0 = a silo itself.
    """

    client: str
    base: str
    rows: int
    report: Any
    size: int
    card: str = ""
    silos: int = 0

    @classmethod
    def read(cls, reply: Message) -> Introduction:
        """Read an answer to ``query.join``."""
        if (error := error_of(reply)) is not None:
            raise FederationError("it cannot join", error, "see that silo's log")
        try:
            check_size(reply.content, LONGEST_TEXT + ROOM, "it")
            check_records(reply.content, "it", "info", "metrics")
            checked(NoNumbers, reply.content.metric_records.get("metrics", {}), "it")
            payload_of(reply.content, "it").check(Payload.empty().manifest, "it")
            told = fields_of(reply.content, Joining, "it")
            name, rows = client_name(told.client), told.train_rows
            if rows < 1:
                raise ValueError(f"{rows} train rows")
            size = encoded_bytes(reply.content)
            return cls(name, told.base, rows, json.loads(told.report), size, told.card, told.silos)
        except Exception as error:  # another machine's bytes
            said = str(error) if isinstance(error, FlexpertsError) else repr(error)
            raise incompatible(
                f"its introduction cannot be read ({said})",
                "a client sends its name, base, number of rows and report",
            ) from error


@dataclass(frozen=True)
class Change:
    """The clients that joined and left since the last look, sorted by name."""

    joined: list[str]
    left: list[str]


class Membership:
    """The nodes that are online.

    A name belongs to the first node that takes part under it, online or not, and a node has one name. In Flower, a
    SuperNode key always has the same node id.

    Args:
        observer: Receives the clients that are turned away.
        run: The run's id. Every request holds it, because silos keep one state per run id.
    """

    def __init__(self, observer: Observer, run: str = "") -> None:
        self.run = run
        self.owners: dict[str, int] = {}
        """Client of the run -> the node that its name belongs to."""
        self.nodes: dict[int, str] = {}
        """Node id -> client, for the clients that are online now."""
        self.told: dict[str, Introduction] = {}
        """Client -> its latest introduction; clients that have left are included."""
        self.refused: list[tuple[str, str]] = []
        """(client or node, reason) of those turned away, until the round's record has them."""
        self.observer = observer
        self._node_of: dict[str, int] = {}
        self._readings: dict[str, str] = {}
        self._away: set[int] = set()

    @property
    def online(self) -> list[str]:
        """Names of the clients that are online, sorted."""
        return sorted(self._node_of)

    @property
    def arrived(self) -> list[str]:
        """Names of the clients that are online, in the order in which they came."""
        return list(self._node_of)

    def node(self, client: str) -> int:
        """Return an online client's node."""
        return self._node_of[client]

    def look(self, grid: Grid, timeout: float) -> Change:
        """Remove the nodes that have left, and ask new nodes for their introduction.

        When a node has left, nodes that were turned away are asked again: their name may be free now.

        Args:
            grid: The grid of nodes.
            timeout: Seconds to wait for answers.
        """
        online = set(grid.get_node_ids())
        left = sorted(self._take_off(node) for node in self.nodes.keys() - online)
        self._away = set() if left else self._away & online
        strangers = sorted(online - self.nodes.keys() - self._away)
        if strangers:
            self.observer.phase("joining", len(strangers))
        joined = self._introduced(grid, strangers, timeout) if strangers else []
        return Change(sorted(joined), left)

    def bind(self, client: str) -> None:
        """Give a name to the node that is online under it, unless it belongs to a node already."""
        self.owners.setdefault(client, self.node(client))

    def turn_away(self, client: str, reason: str) -> None:
        """Remove an online client that may not take part."""
        node = self.node(client)
        self._take_off(node)
        self._refuse(node, client, reason)

    def written_down(self) -> list[tuple[str, str]]:
        """Return the clients and nodes turned away since the last call, with reasons, and clear the list."""
        refused, self.refused = self.refused, []
        return refused

    def _introduced(self, grid: Grid, strangers: Iterable[int], timeout: float) -> list[str]:
        """Ask nodes for their introduction, and return the names of the clients that were let in."""
        asked, silent = Asked(), set(strangers)
        requests = (asked.note(self._who_is(node)) for node in sorted(silent))
        joined = []
        for reply in _by_node(asked, grid.send_and_receive(sendable(grid, requests), timeout=timeout)):
            node = asked.node(reply)
            if node not in silent:
                continue  # the node was not asked, or has answered already
            silent.remove(node)
            if (name := self._let_in(node, reply)) is not None:
                joined.append(name)
        for node in sorted(silent):
            self._refuse(node, f"node {node}", f"it sent no introduction within {timeout:.0f} s", ask_again=True)
        return joined

    def _who_is(self, node: int) -> Message:
        return request(records({"run": self.run}), "query.join", node, "join")

    def _let_in(self, node: int, reply: Message) -> str | None:
        try:
            one = Introduction.read(reply)
        except FederationError as error:
            self._refuse(node, self._called(node, reply), str(error), ask_again=True)
            return None
        if (fault := self._taken(node, one.client)) is not None:
            who = one.client if self.owners.get(one.client, node) == node else f"node {node}"
            self._refuse(node, who, fault)
            return None
        self.nodes[node], self._node_of[one.client], self.told[one.client] = one.client, node, one
        self._readings |= dict.fromkeys(skeletons(one.client), one.client)
        return one.client

    def _taken(self, node: int, name: str) -> str | None:
        """Return why a node cannot have a name; None if it can."""
        if self.owners.get(name, node) != node:
            return (
                f"node {node} says {name}, a name that belongs to node {self.owners[name]}; if that silo has a new "
                f"SuperNode key, run `flexperts forget`"
            )
        if name not in self.owners and (own := next((n for n, its in self.owners.items() if its == node), None)):
            return (
                f"node {node} is the client {own} of this run and now says {name}; use one name in that silo's file"
            )
        if name in self._node_of:
            return f"node {node} has the same name as a client that is online; rename one"
        if (other := alike(name, self._readings)) is not None:
            return f"its name looks like that of {other}, which is online; rename one"
        if name not in self.owners and (other := alike(name, readings_of(self.owners))) is not None:
            return f"its name looks like that of {other}, a client of this run; rename one"
        return None

    def _take_off(self, node: int) -> str:
        client = self.nodes.pop(node)
        del self._node_of[client]
        for look in set(skeletons(client)):
            del self._readings[look]
        return client

    def _called(self, node: int, reply: Message) -> str:
        """Return the name of a node that cannot join; its number if it gives no valid name or another node's."""
        try:
            told = info_of(reply.content)["client"]
            name = client_name(told if isinstance(told, str) and len(told) <= LONGEST_NAME else "")
        except (KeyError, ValueError):
            return f"node {node}"
        return f"node {node}" if name in self._node_of or self.owners.get(name, node) != node else name

    def _refuse(self, node: int, who: str, reason: str, *, ask_again: bool = False) -> None:
        if not ask_again:
            self._away.add(node)
        refusal = who, one_line(reason)
        if refusal not in self.refused:  # the server asks a node again at every look
            self.refused.append(refusal)
            self.observer.refused(*refusal)


def _by_node(asked: Asked, replies: Iterable[Message]) -> Iterable[Message]:
    """Return replies in the order of their nodes, so that the order does not depend on the network."""
    return sorted(replies, key=asked.node) if isinstance(replies, list | tuple) else replies
