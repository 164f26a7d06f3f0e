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
from typing import IO, Any, Self

import torch

from flexperts.client.workspace import Workspace
from flexperts.config.run import EngineConfig
from flexperts.engines.fork_server import Setting
from flexperts.errors import FederationError
from flexperts.modeling.cards import check_undivided
from flexperts.modeling.placement import computing_device
from flexperts.observer import current_observer

AHEAD = 4
"""Calls per worker that are under way or whose results wait for an earlier one's."""


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
    deaths: int = field(default=0, init=False)
    """Workers that died in this call."""
    outcome: IO[bytes] | None = field(default=None, init=False)
    """The worker's last message, on disk: many results may wait for one that takes long."""

    def end(self, message: bytes, folder: Path) -> None:
        """Keep the outcome until it is this call's turn."""
        self.outcome = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - ``result`` closes it
        self.outcome.write(message)
        self.outcome.seek(0)

    def result(self) -> Any:
        """Return the result of a call that has ended, or raise its error."""
        assert self.outcome is not None
        with self.outcome as file:
            kind, value = pickle.load(file)
        if kind == "error":
            raise value
        return value

    def drop(self) -> None:
        """Free the disk space of an outcome that is not wanted."""
        if self.outcome is not None:
            self.outcome.close()


def pool_for(workspace: Workspace, engine: EngineConfig, most: int, folder: Path) -> Pool | None:
    """Return the worker processes that a recipe's ``[engine]`` asks for, or None if this process does their work.

    Args:
        workspace: The rows, and which base to load.
        engine: What is asked for.
        most: Calls that can run at the same time.
        folder: An existing folder on a disk.
    """
    cores, devices = torch.get_num_threads(), engine.devices
    on_cards = computing_device(devices[0] if devices else workspace.config.model.device).type == "cuda"
    if on_cards and not devices:
        devices = tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    asked = engine.workers
    workers = min(most, len(devices) if on_cards else cores) if asked == "auto" else asked
    if workers <= 1:
        return None
    check_undivided(workers)
    threads = engine.threads or max(1, cores // workers)
    return Pool(Setting(workspace, threads, devices if on_cards else ()), workers, folder)


class Pool:
    """A fork server and its workers, until ``close``.

    Args:
        setting: What they work with.
        count: Number of workers.
        folder: An existing folder on a disk, for results that wait.
    """

    def __init__(self, setting: Setting, count: int, folder: Path) -> None:
        self.setting, self.count, self._folder = setting, count, folder
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
        calls, order = iter(calls), deque[Call]()
        try:
            while True:
                while len(self._running) < self.count and len(order) < AHEAD * self.count:
                    if (call := next(calls, None)) is None:
                        break
                    order.append(call)
                    self._start(call)
                if not order:
                    return
                if order[0].outcome is None:
                    self._listen()
                else:
                    yield order.popleft().result()
        finally:
            for connection in list(self._running):  # no one waits for these results any more
                self._let_go(connection)
            for call in order:
                call.drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, call: Call) -> None:
        """Give a call to a worker that is free, or to a new one."""
        free = next((c for c in self._workers if c not in self._running), None)
        connection = self._forked() if free is None else free
        self._running[connection] = call
        with suppress(ConnectionError):  # it has died, which is found when it is listened to
            connection.send((call.function, call.arguments))

    def _listen(self) -> None:
        """Wait for the workers' next messages, and handle them."""
        for connection in wait(self._running):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv_bytes()
            except (EOFError, OSError):
                self._died(connection)
                continue
            kind, *event = pickle.loads(message)
            if kind == "event":
                _pass_on(*event)
            else:
                self._running.pop(connection).end(message, self._folder)

    def _died(self, connection: Connection) -> None:
        """Repeat a dead worker's call with a new worker, or end it with an error."""
        call = self._let_go(connection)
        call.deaths += 1
        if call.deaths == 1:
            current_observer().notice(f"{call.what}: its worker process died; a new one repeats it")
            self._start(call)
            return
        error = FederationError(
            f"{call.what}: two worker processes died in it",
            "they were killed, probably for lack of memory",
            "use fewer workers, or free memory, and start again",
        )
        call.end(pickle.dumps(("error", error)), self._folder)

    def _let_go(self, connection: Connection) -> Call:
        """Forget a worker that runs a call, and return the call; it ends when it next speaks."""
        connection.close()
        self._workers.remove(connection)
        return self._running.pop(connection)

    def _forked(self) -> Connection:
        """Return the connection to a new worker; a fork server that has died is replaced."""
        if not self._server.alive:
            self._server.close()
            self._server = _Server(self.setting)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._server.fork(theirs)
            self._workers.append(connection := Connection(os.dup(ours.fileno())))
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
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # it imports what we do
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
        if not self._loaded:  # it listens only when the base is loaded
            self._process.kill()
        self._connection.close()
        self._control.close()
        self._process.wait()
