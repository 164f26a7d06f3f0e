"""Who is in the federation: which node is which client, and what each told on joining."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from flexperts.communication.messages import info_of, records
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.names import alike, client_name, looks
from flexperts.errors import FederationError, FlexpertsError
from flexperts.observer import Observer
from flexperts.server.exchange import Asked, error_of, one_line, request, sendable


@dataclass(frozen=True)
class Introduction:
    """What a client told on joining.

    Args:
        client: Its name.
        base: Fingerprint of its base.
        rows: Its train rows.
        report: What the method's ``report`` said.
        size: Encoded bytes of the message.
    """

    client: str
    base: str
    rows: int
    report: Any
    size: int

    @classmethod
    def read(cls, reply: Message) -> Introduction:
        """Read an answer to ``query.join``.

        Raises:
            FederationError: It is an error, or none of ours.
        """
        if (error := error_of(reply)) is not None:
            raise FederationError("it cannot join", error, "see that silo's log")
        try:
            info = info_of(reply.content)
            name, rows = client_name(str(info["client"])), int(info["train_rows"])
            report = json.loads(str(info["report"]))
            if rows < 1:
                raise ValueError(f"{rows} train rows")
            return cls(name, str(info["base"]), rows, report, encoded_bytes(reply.content))
        except Exception as error:  # another machine's bytes
            said = str(error) if isinstance(error, FlexpertsError) else repr(error)
            raise FederationError(
                f"it introduces itself wrongly ({said})",
                "a client tells name, base, rows and report",
                "use one flexperts version on every silo",
            ) from error


@dataclass(frozen=True)
class Change:
    """Who came and who went since the last look, sorted."""

    joined: list[str]
    left: list[str]


class Membership:
    """The nodes that are online.

    Args:
        observer: Is told who is turned away.
        run: The run's id, which every request tells: silos keep their state by it.
    """

    def __init__(self, observer: Observer, run: str = "") -> None:
        self.run = run
        self.nodes: dict[int, str] = {}
        """Node id -> client, of those that are online now."""
        self.told: dict[str, Introduction] = {}
        """Client -> what it told when it last joined, of those that have gone too."""
        self.refused: list[tuple[str, str]] = []
        """Who was turned away and why, until it is written down."""
        self.observer = observer
        self._node_of: dict[str, int] = {}
        self._readings: dict[str, str] = {}
        self._away: set[int] = set()

    @property
    def online(self) -> list[str]:
        """Names of the clients that are online, sorted."""
        return sorted(self._node_of)

    def node(self, client: str) -> int:
        """Return an online client's node."""
        return self._node_of[client]

    def look(self, grid: Grid, timeout: float) -> Change:
        """Take off the nodes that have gone and ask those that are new who they are.

        Whoever was turned away is asked again when some node has gone: its name may be free now.

        Args:
            grid: Where the nodes are.
            timeout: Seconds to wait for answers.
        """
        online = set(grid.get_node_ids())
        left = sorted(self._take_off(node) for node in self.nodes.keys() - online)
        self._away = set() if left else self._away & online
        strangers = sorted(online - self.nodes.keys() - self._away)
        joined = self._introduced(grid, strangers, timeout) if strangers else []
        return Change(sorted(joined), left)

    def turn_away(self, client: str, reason: str) -> None:
        """Take a client off that is online and may not take part."""
        node = self.node(client)
        self._take_off(node)
        self._refuse(node, client, reason)

    def written_down(self) -> list[tuple[str, str]]:
        """Return who was turned away since this was last called."""
        refused, self.refused = self.refused, []
        return refused

    def _introduced(self, grid: Grid, strangers: Iterable[int], timeout: float) -> list[str]:
        """Ask nodes who they are and return the names of those that are in now."""
        asked, silent = Asked(), set(strangers)
        requests = (asked.note(self._who_is(node)) for node in sorted(silent))
        joined = []
        for reply in _by_node(asked, grid.send_and_receive(sendable(grid, requests), timeout=timeout)):
            node = asked.node(reply)
            if node not in silent:
                continue  # it was not asked, or has answered already
            silent.remove(node)
            if (name := self._let_in(node, reply)) is not None:
                joined.append(name)
        for node in sorted(silent):
            self._refuse(node, f"node {node}", f"it did not say who it is within {timeout:.0f} s", ask_again=True)
        return joined

    def _who_is(self, node: int) -> Message:
        return request(records({"run": self.run}), "query.join", node, "join")

    def _let_in(self, node: int, reply: Message) -> str | None:
        try:
            one = Introduction.read(reply)
        except FederationError as error:
            self._refuse(node, self._called(node, reply), str(error), ask_again=True)
            return None
        if one.client in self._node_of:
            self._refuse(node, one.client, f"node {node} says so too, and the name's owner is online; rename one")
            return None
        if (other := alike(one.client, self._readings)) is not None:
            self._refuse(node, one.client, f"its name reads like that of {other}, who is online; rename one")
            return None
        self.nodes[node], self._node_of[one.client], self.told[one.client] = one.client, node, one
        self._readings |= dict.fromkeys(looks(one.client), one.client)
        return one.client

    def _take_off(self, node: int) -> str:
        client = self.nodes.pop(node)
        del self._node_of[client]
        for look in set(looks(client)):
            del self._readings[look]
        return client

    def _called(self, node: int, reply: Message) -> str:
        """Return what to call a node that cannot join: by the name it gives, unless it is none or another's."""
        try:
            name = client_name(str(info_of(reply.content)["client"]))
        except (KeyError, ValueError):
            return f"node {node}"
        return f"node {node}" if name in self._node_of else name

    def _refuse(self, node: int, who: str, reason: str, *, ask_again: bool = False) -> None:
        if not ask_again:
            self._away.add(node)
        refusal = who, one_line(reason)
        if refusal not in self.refused:  # while others are waited for, a node is asked again and again
            self.refused.append(refusal)
            self.observer.refused(*refusal)


def _by_node(asked: Asked, replies: Iterable[Message]) -> Iterable[Message]:
    """Return replies in the order of their nodes, so that who comes first does not hang on the network."""
    return sorted(replies, key=asked.node) if isinstance(replies, list | tuple) else replies
