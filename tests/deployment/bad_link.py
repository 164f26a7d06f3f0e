"""A proxy that is a bad link: late, narrow, cut in the middle of messages, or gone for a while."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time

from .proxy import RecordingProxy

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes closing a connection a reset."""


class BadLink(RecordingProxy):
    """Passes connections on to a port, badly.

    Args:
        target: Port on loopback.
        delay: Seconds by which each piece is late, in each direction.
        rate: Bytes a second of each direction of a connection.
        cuts: Share of the connections that are reset, after 1 to 60,000 bytes.
        idle: Seconds without a byte after which a connection is closed, as proxies do.
        family: Of the address that it listens on.
    """

    def __init__(
        self,
        target: int,
        *,
        delay: float = 0.0,
        rate: float = float("inf"),
        cuts: float = 0.0,
        idle: float | None = None,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> None:
        self.delay, self.rate, self.cuts, self.idle = delay, rate, cuts, idle
        self.cut = 0
        """Connections that were reset."""
        self.refused = 0
        """Connections that came while the link was gone."""
        self._gone = threading.Event()
        self._stream = random.Random(7)
        super().__init__(target, family)

    def go(self, seconds: float) -> None:
        """Be gone for so many seconds: all connections are reset, new ones are not taken."""
        self._gone.set()
        for end in self._open[1:]:
            _reset(end)
        time.sleep(seconds)
        self._gone.clear()

    def _takes(self, inner: socket.socket) -> bool:
        if not self._gone.is_set():
            return True
        self.refused += 1
        _reset(inner)
        return False

    def _join(self, inner: socket.socket, outer: socket.socket) -> None:
        left = self._stream.randint(1, 60_000) if self._stream.random() < self.cuts else None
        for source, sink in ((inner, outer), (outer, inner)):
            source.settimeout(self.idle)
            self._run(self._carry, source, sink, left)

    def _carry(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay + len(data) / self.rate)
                if left is not None and len(data) >= left:
                    sink.sendall(data[:left])  # the middle of a message
                    self.cut += 1
                    break
                left = None if left is None else left - len(data)
                sink.sendall(data)
        for end in (source, sink):
            _reset(end)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RDWR)
