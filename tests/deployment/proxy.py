"""A TCP proxy that keeps every byte: what somebody who reads the network sees."""

from __future__ import annotations

import contextlib
import socket
import threading


class RecordingProxy:
    """Passes connections on to a port and records both directions.

    Args:
        target: Port on loopback.
    """

    def __init__(self, target: int) -> None:
        self.target, self.chunks = target, list[list[bytes]]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def streams(self) -> list[bytes]:
        """Return what has passed, each connection and direction on its own."""
        return [b"".join(chunks) for chunks in self.chunks]

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            outer = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

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
