"""The worker's Unix socket in the state folder: it serves one caller at a time, bytes only."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from filelock import FileLock, Timeout

from flexperts.deployment.state import lock_of, make_private, socket_of
from flexperts.errors import ArtifactError
from flexperts.files import remove_parts

LONGEST_MESSAGE = 1 << 33
"""Size in bytes of the longest message that is read."""
_PATIENCE = 60
"""Seconds after which a caller that stalls in the middle of a message is dropped."""
_WAITING = 16
"""Most callers that wait for their turn."""

log = logging.getLogger(__name__)


@contextmanager
def listening(state: Path) -> Iterator[Listener]:
    """Yield the socket of a state folder, for this process alone; it is removed after the block."""
    make_private(state)
    with _alone(state):
        socket_of(state).unlink(missing_ok=True)  # left by a killed worker; we hold the lock
        remove_parts(state)
        with Listener(str(socket_of(state)), family="AF_UNIX", backlog=_WAITING) as listener:
            socket_of(state).chmod(0o600)
            yield listener


def is_served(state: Path) -> bool:
    """Return whether a worker serves a state folder now."""
    try:
        with _alone(state):
            return False
    except ArtifactError:
        return True


def serve_requests(listener: Listener, answer: Callable[[bytes], bytes]) -> None:
    """Answer requests one at a time, until a ``BaseException`` such as ``SystemExit`` is raised.

    A connection is one request and one reply. Callers that close the connection, stall or send too much are
    dropped.

    Args:
        listener: The socket that callers connect to.
        answer: Function from a request to its reply; it raises no ``Exception``.
    """
    while True:
        with listener.accept() as connection:
            try:
                _bound(connection)
                connection.send_bytes(answer(connection.recv_bytes(LONGEST_MESSAGE)))
            except (OSError, EOFError) as error:
                log.warning("a connection was closed early (%s)", type(error).__name__)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    try:
        with FileLock(lock_of(state), timeout=0, mode=0o600):
            yield
    except Timeout as error:
        raise ArtifactError(
            f"{state}", "another worker serves it", "stop that worker, or give this silo another state folder"
        ) from error


def _bound(connection: Connection) -> None:
    """Limit the wait of every read and write, so that the next caller does not wait for ever."""
    limit = struct.pack("ll", _PATIENCE, 0)
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
