"""Worker processes with one copy of the base: calls run side by side, results come in the order of the calls."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from flexperts.engines.fork_server import Setting
from flexperts.errors import FederationError
from flexperts.observer import current_observer

_AHEAD = 4
"""Results per worker that may wait for an earlier one; they wait on disk."""


@dataclass
class Call:
    """A function that a worker runs.

    Args:
        what: What it does, for errors.
        function: A function of a module; its first argument is the worker's workspace.
        arguments: Its other arguments.
    """

    what: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    died: int = field(default=0, init=False)
    """Workers that died in this call."""
    waiting: IO[bytes] | None = field(default=None, init=False)
    """The result, while it waits for an earlier call's."""


class Pool:
    """A fork server and its workers, until ``close``.

    Args:
        setting: What they work with.
        workers: Number of workers.
        folder: An existing folder on a disk, for results that wait.
    """

    def __init__(self, setting: Setting, workers: int, folder: Path) -> None:
        self._setting, self._folder, self._count = setting, folder, workers
        self._server = _Server(setting)
        self._workers: list[Connection] = []
        self._running: dict[Connection, Call] = {}

    def close(self) -> None:
        """End the fork server and its workers."""
        self._server.close()
        for connection in self._workers:
            connection.close()

    def results(self, calls: Iterable[Call]) -> Iterator[Any]:
        """Yield the calls' results in their order; a call is taken from the iterable when a worker is free for it.

        A call whose worker dies is repeated by a new worker, once.

        Raises:
            FederationError: A worker died in the same call again.
            Exception: A call raised it; one that is not this package's is a ``RuntimeError`` with its traceback.
        """
        calls, ahead = iter(calls), _AHEAD * self._count
        order: deque[Call] = deque()
        while True:
            while len(self._running) < self._count and len(order) < ahead and (call := next(calls, None)):
                order.append(call)
                self._start(call)
            if not order:
                return
            first = order[0]
            if first.waiting is None and (found := self._heard(first)) is not None:
                order.popleft()
                yield pickle.loads(found)
            elif first.waiting is not None:
                order.popleft()
                with first.waiting as file:
                    yield pickle.load(file)

    def _start(self, call: Call) -> None:
        """Give a call to a worker that is free, or to a new one."""
        free = next((c for c in self._workers if c not in self._running), None)
        connection = self._forked() if free is None else free
        self._running[connection] = call
        with suppress(ConnectionError):  # it has died, which is found when it is listened to
            connection.send((call.function, call.arguments))

    def _heard(self, first: Call) -> bytes | None:
        """Wait for the workers' next messages, and handle them; return the result of ``first`` if it came."""
        found = None
        for connection in wait(self._running):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv_bytes()
            except (EOFError, OSError):
                self._bury(connection)
                continue
            kind, *told = pickle.loads(message)
            if kind == "event":
                _pass_on(*told)
                continue
            call = self._running.pop(connection)
            if kind == "error":
                raise told[0]
            result = pickle.dumps(told[0])
            if call is first:
                found = result
            else:
                call.waiting = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - read, and closed, at its turn
                call.waiting.write(result)
                call.waiting.seek(0)
        return found

    def _bury(self, connection: Connection) -> None:
        """Repeat a dead worker's call with a new worker."""
        connection.close()
        self._workers.remove(connection)
        call = self._running.pop(connection)
        call.died += 1
        if call.died > 1:
            raise FederationError(
                f"{call.what}: two worker processes died in it",
                "they were killed, probably for lack of memory",
                "use fewer workers, or free memory, and resume",
            )
        current_observer().notice(f"{call.what}: its worker process died; a new one repeats it")
        self._start(call)

    def _forked(self) -> Connection:
        """Return the connection to a new worker; a fork server that has died is replaced."""
        if not self._server.alive:
            self._server.close()
            self._server = _Server(self._setting)
        ours, theirs = socket.socketpair()
        with theirs:
            self._server.fork(theirs)
        self._workers.append(connection := Connection(ours.detach()))
        return connection


def _pass_on(event: str, *arguments: Any) -> None:
    """Tell this process's observer of an event in another process."""
    getattr(current_observer(), event)(*arguments)


class _Server:
    """The fork server as the parent process sees it; its start does not wait for the base."""

    def __init__(self, setting: Setting) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flexperts.engines.fork_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._control, self._connection = ours, Connection(os.dup(ours.fileno()))
        self._connection.send(setting)
        self._loaded = False

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def fork(self, theirs: socket.socket) -> None:
        """Have it fork a worker with this end of a connection.

        Raises:
            Exception: It cannot load the base or the rows.
        """
        try:
            while not self._loaded:
                match self._connection.recv():
                    case ("event", *told):
                        _pass_on(*told)
                    case None:
                        self._loaded = True
                    case error:
                        raise error
            socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise FederationError(
                "the process that holds the base has died",
                "it was killed, probably for lack of memory",
                "free memory, and resume",
            ) from error

    def close(self) -> None:
        """End it and all its workers."""
        self._connection.close()
        self._control.close()
        self._process.wait()
