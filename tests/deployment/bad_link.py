"""A proxy that is a bad link: late, narrow, lossy, cut in the middle of messages, or gone for a while."""

from __future__ import annotations

import contextlib
import ctypes
import random
import socket
import struct
import threading
import time

from .proxy import RecordingProxy

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes closing a connection a reset."""
_ATTACH_FILTER = 26
"""SO_ATTACH_FILTER of Linux, which Python does not name."""
_MEMINFO = 55
"""SO_MEMINFO of Linux; its ninth number is how many segments of a socket were dropped."""


class BadLink(RecordingProxy):
    """Passes connections on to a port, badly.

    Args:
        target: Port on loopback.
        delay: Seconds by which each piece is late, in each direction.
        rate: Bytes a second of each direction of a connection.
        cuts: Share of the connections that are reset, after 1 to 60,000 bytes.
        idle: Seconds without a byte after which a connection is closed, as proxies do.
        loss: Share of the TCP segments from either end that are dropped.
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
        loss: float = 0.0,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> None:
        self.delay, self.rate, self.cuts, self.idle, self.loss = delay, rate, cuts, idle, loss
        self.cut = 0
        """Connections that were reset."""
        self.refused = 0
        """Connections that came while the link was gone."""
        self._gone = threading.Event()
        self._stream = random.Random(7)
        super().__init__(target, family)
        _drop(self._listener, loss)  # the connections that it takes do so too

    @property
    def dropped(self) -> int:
        """Segments that were dropped, until it is closed."""
        return sum(struct.unpack("9I", end.getsockopt(socket.SOL_SOCKET, _MEMINFO, 36))[8] for end in self._open)

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
        _drop(outer, self.loss)
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


def _drop(end: socket.socket, share: float) -> None:
    """Have the kernel drop a share of the segments that arrive at a socket.

    The filter is classic BPF: load a random 32-bit number; if it is in the share, keep 0 bytes, else all.
    """
    if not share:
        return
    random_number, largest = 0xFFFFF000 + 56, 2**32 - 1  # SKF_AD_OFF + SKF_AD_RANDOM
    lines = [
        (0x20, 0, 0, random_number),
        (0x35, 0, 1, int((1 - share) * 2**32)),
        (0x06, 0, 0, 0),
        (0x06, 0, 0, largest),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HL", len(lines), ctypes.addressof(code))
    end.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
