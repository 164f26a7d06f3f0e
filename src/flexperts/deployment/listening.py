"""The worker's Unix socket: it serves one caller at a time, bytes only, and only the users that may ask."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from filelock import FileLock, Timeout

from flexperts.config.silo import SiloSocket
from flexperts.deployment.callers import allowed_users, give_to_group, make_folder, user_of_peer
from flexperts.deployment.state import lock_of, make_private, socket_of
from flexperts.errors import ArtifactError
from flexperts.files import remove_parts

_PATIENCE = 60
"""Seconds after which a caller that stalls in the middle of a message is dropped."""
_LONGEST_TRANSFER = 600
"""Seconds after which a caller is dropped whose request, or whose reading of the reply, has not ended."""
_WAITING = 16
"""Most callers that wait for their turn."""

log = logging.getLogger(__name__)


@contextmanager
def listening(state: Path, door: SiloSocket | None = None) -> Iterator[Listener]:
    """Yield the worker's socket, for this process alone; it is removed after the block.

    Args:
        state: The silo's state folder, in which the socket is unless there is a ``door``.
        door: The socket for other users, in a folder of its own.
    """
    make_private(state)
    with _alone(state):
        path = socket_of(state) if door is None else make_folder(door)
        path.unlink(missing_ok=True)  # left by a killed worker; we hold the lock
        remove_parts(state)
        with Listener(str(path), family="AF_UNIX", backlog=_WAITING) as listener:
            path.chmod(0o600)
            if door is not None:
                give_to_group(path, door, 0o660)
            yield listener


def is_served(state: Path) -> bool:
    """Return whether a worker serves a state folder now."""
    try:
        with _alone(state):
            return False
    except ArtifactError:
        return True


def serve_requests(
    listener: Listener,
    answer: Callable[[bytes | None], bytes],
    most: int,
    door: SiloSocket | None = None,
    called: Callable[[int, bool], None] = lambda user, may_ask: None,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Answer requests one at a time, until a ``BaseException`` such as ``SystemExit`` is raised.

    A connection is one request and one reply. Callers that are not among the users of ``door`` (by default, this
    process's user) are dropped before anything is read from them; so are those that close the connection or stall.

    Args:
        listener: The socket that callers connect to.
        answer: Function from a request to its reply; it raises no ``Exception``. It gets None for a request that is
            too long.
        most: Bytes of the longest request that is read.
        door: The silo's settings for a socket that other users can open.
        called: Told each caller's user, and whether it gets an answer, before anything is read.
        until: Whether the request that was just answered is the last one.
    """
    allowed = allowed_users(door)
    while True:
        with listener.accept() as connection, socket.socket(fileno=os.dup(connection.fileno())) as same:
            user = user_of_peer(same)
            called(user, user in allowed)
            if user not in allowed:
                log.warning("a process of user %d is refused: it is not in socket.users", user)
                continue
            try:
                with _bounded(same):
                    request = _received(connection, most)
                reply = answer(request)
                with _bounded(same):
                    connection.send_bytes(reply)
            except (OSError, EOFError, MemoryError) as error:
                log.warning("a connection was closed early (%s)", type(error).__name__)
            else:
                if until():
                    return


def _received(connection: Connection, most: int) -> bytes | None:
    """Return a request; None if it is longer than ``most`` bytes, of which none is read."""
    try:
        return connection.recv_bytes(most)
    except OSError:
        if connection.readable:
            raise
        return None


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    try:
        with FileLock(lock_of(state), timeout=0, mode=0o600):
            yield
    except Timeout as error:
        raise ArtifactError(
            f"{state}", "another worker serves it", "stop that worker, or give this silo another state folder"
        ) from error


@contextmanager
def _bounded(same: socket.socket) -> Iterator[None]:
    """Limit each wait of a transfer, and the whole of it, so that the next caller does not wait for ever."""
    limit = struct.pack("ll", _PATIENCE, 0)
    same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    end = threading.Timer(_LONGEST_TRANSFER, _hang_up, [same])
    end.daemon = True
    end.start()
    try:
        yield
    finally:
        end.cancel()


def _hang_up(same: socket.socket) -> None:
    with suppress(OSError):  # the caller has gone
        same.shutdown(socket.SHUT_RDWR)
