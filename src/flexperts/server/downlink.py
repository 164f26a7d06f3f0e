"""What clients receive: all shared weights, or what changed in them since the version that a client has.

With ``compression.downlink``, the shared weights after a round are the version that clients rebuild, on the server
too: methods, checkpoint, adapter and evaluation have the same weights as the clients. What packing lost is added to
the next round's difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from flexperts.communication.messages import LACKS_COPY, difference_records, records
from flexperts.communication.versions import Versions
from flexperts.config.federation import CompressionConfig
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server.exchange import error_of


class Downlink:
    """The requests' weights of one run.

    Args:
        settings: The recipe's section.
        server: The run's state.
    """

    def __init__(self, settings: CompressionConfig, server: Server) -> None:
        self.settings, self.server = settings.down, server
        self._known: Payload | None = None

    def content(self, info: Mapping[str, Any], payload: Payload, client: str, *, whole: bool) -> RecordDict:
        """Return a request's content.

        Args:
            info: Its texts and numbers.
            payload: The weights.
            client: Who gets it.
            whole: Whether the client needs all weights.
        """
        versions = self._versions()
        since = None if whole or versions is None or not payload.size else versions.since(client)
        return records(info, payload=payload) if since is None else difference_records(info, *since)

    def received(self, client: str) -> None:
        """Record that a client has answered, and so has the newest version."""
        if (versions := self.server.versions) is not None:
            versions.held[client] = versions.newest

    def completed(
        self,
        replies: Iterator[Message],
        client: Callable[[Message], str],
        send: Callable[[list[str]], Iterable[Message]],
    ) -> Iterator[Message]:
        """Yield replies in their order; after the first client that lacks its copy, the rest is held in memory.

        A client that lacks its copy and sends nothing after it got all weights has no reply.

        Args:
            replies: The replies to an exchange.
            client: Returns who has sent a reply.
            send: Sends clients all weights, and returns their replies.
        """
        for reply in replies:
            if error_of(reply) != LACKS_COPY:
                if error_of(reply) is None:
                    self.received(client(reply))
                yield reply
                continue
            rest = {client(other): other for other in (reply, *replies)}
            lacking = sorted(name for name, other in rest.items() if error_of(other) == LACKS_COPY)
            rest = {name: other for name, other in rest.items() if name not in lacking}
            rest |= {client(other): other for other in send(lacking)}
            for name in sorted(rest):
                if error_of(rest[name]) is None:
                    self.received(name)
                yield rest[name]

    def advance(self, before: Payload) -> None:
        """Make the shared weights the next version, after a round has been aggregated.

        Args:
            before: The shared weights that the round began with.
        """
        server = self.server
        after, server.shared = server.shared, before
        versions = self._versions()
        server.shared = after
        if versions is None or after is before or not after.size or np.array_equal(after.vector, before.vector):
            return
        if after.manifest == before.manifest and np.isfinite(after.vector).all():
            server.shared = versions.add(before, after, self.settings)
            self._known = server.shared

    def _versions(self) -> Versions | None:
        """Return the versions; if the shared weights are none of them, they are a new one that no client has."""
        server, versions = self.server, self.server.versions
        if versions is not None and server.shared is not self._known:
            if server.shared.digest() != versions.digests[-1]:
                versions.restart(server.shared)
            self._known = server.shared
        return versions
