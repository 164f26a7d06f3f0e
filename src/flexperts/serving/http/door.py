"""The listening socket, which bounds the connections of callers who have not shown a key.

uvicorn bounds requests (``limit_concurrency``) and pauses after them (``timeout_keep_alive``), but neither
connections on which nothing was asked nor requests that arrive slowly. Here both end, also during TLS handshakes: a
connection waits from its start, and from each request without a key, until a request with one comes.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

Peer = tuple[str, int]
"""Address and port of a connection's other end."""
_HELD = 1024
"""Connections that the system holds until they are accepted."""
PATIENCE = 10.0
"""Seconds for which a connection may wait."""


class Door(socket.socket):
    """A listening socket; all but ``listen_to`` is used on the event loop's thread only.

    Args:
        listening: The socket to take over.
        most: Most connections that wait at the same time; above it, the one that has waited longest is closed.
    """

    def __init__(self, listening: socket.socket, most: int) -> None:
        super().__init__(fileno=listening.detach())
        self._most = most
        self._open: dict[Peer, socket.socket] = {}
        self._waiting: dict[Peer, asyncio.TimerHandle] = {}

    def listen(self, backlog: int = 0, /) -> None:
        """Listen; the system holds more connections than the event loop accepts before it reads from them."""
        super().listen(max(backlog, _HELD))

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """Accept a connection; called by the event loop."""
        connection, address = super().accept()
        peer: Peer = address[:2]
        self._open[peer] = connection
        self.wait(peer)
        if len(self._waiting) > self._most:
            self._forget_closed()
        while len(self._waiting) > self._most:
            self._hang_up(next(iter(self._waiting)))
        return connection, address

    def wait(self, peer: Peer | None) -> None:
        """Let a connection wait from now on: it is new, its request had no key, or its answer has ended."""
        self.keep(peer)
        if peer in self._open:
            self._waiting[peer] = asyncio.get_running_loop().call_later(PATIENCE, self._hang_up, peer)

    def keep(self, peer: Peer | None) -> None:
        """Let a connection last until its answer has ended: its caller has a key."""
        if peer is not None and (timer := self._waiting.pop(peer, None)):
            timer.cancel()

    def _hang_up(self, peer: Peer) -> None:
        """Close a connection from below: the event loop then sees its end, whatever it is doing with it."""
        self.keep(peer)
        with suppress(OSError):  # it has ended already
            self._open.pop(peer).shutdown(socket.SHUT_RDWR)

    def _forget_closed(self) -> None:
        for peer in [peer for peer, connection in self._open.items() if connection.fileno() < 0]:
            self.keep(peer)
            del self._open[peer]
