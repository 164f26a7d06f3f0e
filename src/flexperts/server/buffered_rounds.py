"""Rounds that end with the first updates; the others count in the round in which they arrive.

Source: FedBuff (Nguyen et al., 2022, https://arxiv.org/abs/2106.06639). An update is what a client's training
changed in the weights that it was sent. It is added to the weights that the server has when it arrives, and counts
for less the more rounds have ended in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from flexperts.communication.messages import metrics_of
from flexperts.config.federation import FederationConfig
from flexperts.methods.kit.server_state import Flight, Server
from flexperts.parameters.vector import Payload
from flexperts.seeding import generator
from flexperts.server.exchange import Asked, LazyGrid
from flexperts.server.membership import Membership

Accepts = Callable[[str, Message], bool]
"""Tells of a client's reply whether its update can be used."""
_POLL = 3.0
"""Seconds between two looks for replies, as in Flower's grid."""


class BufferedRounds:
    """Who trains, from which weights, and whose update has arrived.

    Args:
        settings: The recipe's section.
        server: The run's state: its ``flights`` are the clients that train now, also when the run is resumed.
        members: The clients that are online.
    """

    def __init__(self, settings: FederationConfig, server: Server, members: Membership) -> None:
        self.settings, self.server, self._members = settings, server, members
        self.asked = Asked()
        self.arrived: list[str] = []
        """The clients whose replies ended this round."""
        self.overdue: list[str] = []
        """The clients that did not answer within the deadline."""
        self.full = False
        """Whether the round ended with ``buffer`` usable updates: it needs no quorum then."""
        self._waiting: dict[str, Message] = {}
        self._pending: dict[str, str] = {}
        self._until: dict[str, float] = {}

    def ask(self, number: int, online: Collection[str]) -> list[str]:
        """Return the clients to ask, sorted: those that are drawn now, and those that were at work and are back.

        A client that goes offline while it trains may have finished, so it is asked the same again when it is back.
        It is waited for as long as for any reply.

        Args:
            number: The round.
            online: The clients that are online.
        """
        server, flights = self.server, self.server.flights
        for name in flights.keys() - set(online):
            self._pending.pop(name, None)
            self._until.setdefault(name, time.monotonic() + self.settings.deadline)
        at_work = flights.keys() & set(online)
        again = at_work - self._waiting.keys() - self._pending.keys()
        idle = sorted(set(server.clients) & set(online) - flights.keys())
        room = max(0, self.settings.drawn(len(server.clients)) - len(at_work))
        order = torch.randperm(len(idle), generator=generator(server.seed, "participants", number)).tolist()
        new = [idle[place] for place in order[:room]]
        flights.update({name: Flight(number, server.clock) for name in new})
        if new:
            server.sent[number] = server.shared
        return sorted([*again, *new])

    def sent(self, client: str) -> tuple[int, Payload]:
        """Return the round for which a client was asked, and the weights that it was sent."""
        number = self.server.flights[client].number
        return number, self.server.sent[number]

    def receive(self, grid: Grid, requests: Iterator[Message], accepts: Accepts) -> list[Message]:
        """Send requests, and return the replies that end the round.

        On one machine simulated time decides which these are. Replies that cannot be used do not end a round, so a
        few silos cannot fill it with them. Elsewhere, a round also ends when all who train have answered or are
        later than the deadline; those are not waited for any more.
        """
        take = self._simulated if isinstance(grid, LazyGrid) else self._real
        found = take(grid, requests, accepts)
        self.arrived = sorted(found)
        return list(found.values())

    def weight(self, client: str, number: int) -> float:
        """Return how much a client's update counts in a round."""
        return float((1 + number - self.server.flights[client].number) ** -self.settings.staleness)

    def close(self) -> None:
        """Let those who have answered or are overdue be asked again, and drop weights that nobody trains from."""
        for name in (*self.arrived, *self.overdue):
            self._forget(name)
        used = {flight.number for flight in self.server.flights.values()}
        self.server.sent = {number: weights for number, weights in self.server.sent.items() if number in used}

    def _simulated(self, grid: Grid, requests: Iterator[Message], accepts: Accepts) -> dict[str, Message]:
        for reply in grid.send_and_receive(requests):
            self._waiting[self._members.nodes[self.asked.node(reply)]] = reply
        ends = {name: self._end(name, reply) for name, reply in self._waiting.items()}
        first, usable = list[str](), 0
        for name in sorted(ends, key=lambda name: (ends[name], name)):
            first.append(name)
            usable += accepts(name, self._waiting[name])
            if usable == self.settings.buffer:
                break
        self.full = usable == self.settings.buffer
        self.server.clock = max([self.server.clock, *(ends[name] for name in first)])
        return {name: self._waiting.pop(name) for name in first}

    def _end(self, name: str, reply: Message) -> float:
        steps = int(metrics_of(reply.content)["steps"])
        return self.server.flights[name].since + steps * self.settings.seconds_of_step(name)

    def _real(self, grid: Grid, requests: Iterator[Message], accepts: Accepts) -> dict[str, Message]:
        messages = list(requests)
        names = [self._members.nodes[message.metadata.dst_node_id] for message in messages]
        until = time.monotonic() + self.settings.deadline
        ids = grid.push_messages(messages)
        self._pending |= {name: its for name, its in zip(names, ids, strict=True) if its}
        self._until |= dict.fromkeys(names, until)
        found, usable = dict[str, Message](), 0
        while True:
            for name, message_id in list(self._pending.items()):
                for reply in grid.pull_messages([message_id]):
                    found[name] = reply
                    usable += accepts(name, reply)
                    del self._pending[name]
            now = time.monotonic()
            late = [name for name, end in self._until.items() if end < now and name not in found]
            self.full = usable >= (self.settings.buffer or 1)
            if self.full or self._pending.keys() <= set(late):
                self.overdue = late
                return found
            time.sleep(_POLL)

    def _forget(self, name: str) -> None:
        self.server.flights.pop(name, None)
        self._waiting.pop(name, None)
        self._pending.pop(name, None)
        self._until.pop(name, None)
