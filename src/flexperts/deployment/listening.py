"""The worker's door: a Unix socket in the state folder, one caller after the other, bytes only."""

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

LONGEST_MESSAGE = 1 << 33
"""Bytes of the longest message that is read."""
_PATIENCE = 60
"""Seconds that a caller may stall in the middle of a message."""
_WAITING = 16
"""Callers that may wait for their turn."""

log = logging.getLogger(__name__)


@contextmanager
def listening(state: Path) -> Iterator[Listener]:
    """Yield the socket of a state folder, which is this process's alone inside the block; it is removed after.

    Raises:
        ArtifactError: The folder is not private, or another worker serves it.
        ConfigError: The socket's path would be too long.
    """
    make_private(state)
    with _alone(state):
        socket_of(state).unlink(missing_ok=True)  # a killed worker's; whoever holds the lock is the only one
        with Listener(str(socket_of(state)), family="AF_UNIX", backlog=_WAITING) as listener:
            socket_of(state).chmod(0o600)
            yield listener


def is_served(state: Path) -> bool:
    """Tell whether a worker serves a state folder now."""
    try:
        with _alone(state):
            return False
    except ArtifactError:
        return True


def serve(listener: Listener, answer: Callable[[bytes], bytes]) -> None:
    """Answer one request after the other, until something that is no ``Exception`` is raised.

    A connection is one request and one reply. Callers that hang up, stall or send too much are dropped.

    Args:
        listener: Where callers come in.
        answer: Makes a reply of a request; it raises nothing.
    """
    while True:
        with listener.accept() as connection:
            try:
                _bound(connection)
                connection.send_bytes(answer(connection.recv_bytes(LONGEST_MESSAGE)))
            except (OSError, EOFError) as error:
                log.warning("a caller hung up (%s)", type(error).__name__)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    try:
        with FileLock(lock_of(state), timeout=0, mode=0o600):
            yield
    except Timeout as error:
        raise ArtifactError(
            f"{state}", "another worker serves it", "stop that one, or give this silo a state folder of its own"
        ) from error


def _bound(connection: Connection) -> None:
    """Limit the time that any single read or write may wait; the next caller must not wait for ever."""
    limit = struct.pack("ll", _PATIENCE, 0)
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
