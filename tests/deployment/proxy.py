"""A TCP proxy that keeps every byte: what somebody who reads the network sees."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class RecordingProxy:
    """Passes connections on to a port and records both directions.

    Args:
        target: Port on loopback.
        family: Of the address that it listens on.
    """

    def __init__(self, target: int, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.target, self.chunks = target, list[list[bytes]]()
        own = "127.0.0.1" if family == socket.AF_INET else "::1"
        self._listener = socket.create_server((own, 0), family=family)
        self.port = int(self._listener.getsockname()[1])
        self._open = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def streams(self) -> list[bytes]:
        """Return what has passed, each connection and direction on its own."""
        return [b"".join(chunks) for chunks in self.chunks]

    def close(self) -> None:
        """Hang up on everybody and wait until it is quiet."""
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(10.0)
        for end in self._open:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            if not self._takes(inner):
                inner.close()
                continue
            outer = socket.create_connection(("127.0.0.1", self.target))
            self._open += [inner, outer]
            self._join(inner, outer)

    def _takes(self, inner: socket.socket) -> bool:
        """Return whether a connection is passed on."""
        return True

    def _join(self, inner: socket.socket, outer: socket.socket) -> None:
        """Carry what comes at each end to the other."""
        for source, sink in ((inner, outer), (outer, inner)):
            self._run(self._pump, source, sink)

    def _run(self, carry: Callable[..., None], *ends: object) -> None:
        pump = threading.Thread(target=carry, args=ends, daemon=True)
        self._threads.append(pump)
        pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        chunks: list[bytes] = []
        self.chunks.append(chunks)
        try:
            while data := source.recv(65536):
                chunks.append(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
