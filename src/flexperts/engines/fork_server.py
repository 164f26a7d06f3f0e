"""The fork server: a process that loads a run's base once, and forks the workers, which share its memory.

It computes with one thread and no device until then, so that a fork inherits no thread pool and no device's state.
``engines/pool.py`` is the other end of its socket, and of the workers'.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

import torch

from flexperts.client.workspace import Workspace
from flexperts.environment import DEVICE
from flexperts.errors import FlexpertsError
from flexperts.methods.registry import method_paths, register_method
from flexperts.modeling.memory import freed_memory_kept
from flexperts.observer import Relay, TurnState, observing

_PAUSE = 0.2
"""Seconds between two states of a turn: sending costs more than a step of a tiny model."""


@dataclass(frozen=True)
class Setting:
    """What a pool's processes work with.

    Args:
        workspace: The rows, and which base to load.
        threads: CPU threads of each worker.
        devices: Devices of the workers in turn; none means the CPU, where the base is loaded before the fork.
    """

    workspace: Workspace
    threads: int
    devices: Sequence[str] = ()
    methods: Mapping[str, str] = field(default_factory=method_paths)
    """Import paths of all methods: the parent process may have registered its own."""

    def register(self) -> None:
        """Register the methods in this process."""
        for name, path in self.methods.items():
            register_method(name, path)


class Sink(Protocol):
    """What takes events, such as a connection."""

    def send(self, event: Any, /) -> None:
        """Take one."""


class Remote(Relay):
    """Observer that sends events to the parent process; of a turn's states only a few per second.

    Args:
        connection: Where to.
    """

    def __init__(self, connection: Sink) -> None:
        super().__init__(lambda *event: connection.send(("event", *event)))
        self._next = 0.0

    def turn(self, state: TurnState) -> None:
        """Send a turn's state, unless one was sent just before; the last one is sent always."""
        now = time.monotonic()
        if now >= self._next or state.done == state.total:
            self._next = now + _PAUSE
            super().turn(state)


def main(descriptor: int) -> None:
    """Load, report, and fork a worker for every socket that comes; end all of them when the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    warnings.simplefilter("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    torch.set_num_threads(1)
    control = socket.socket(fileno=descriptor)
    parent = Connection(os.dup(descriptor))
    setting: Setting = parent.recv()
    with observing(Remote(parent)):
        parent.send(_loaded(setting))
    gc.collect()
    gc.freeze()  # or the collector would write to, and so copy, every page of these objects in each worker
    workers: list[int] = []
    while (asked := socket.recv_fds(control, 1, 1))[0]:
        [theirs] = asked[1]
        if (worker := os.fork()) == 0:
            control.close()
            parent.close()
            _work(Connection(theirs), setting, len(workers))
        os.close(theirs)
        workers.append(worker)
        parent.send(worker)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)  # what it writes is whole or absent at any time; a dead one is a zombie yet
        os.waitpid(worker, 0)


def _loaded(setting: Setting) -> Exception | None:
    """Load what workers share; return the error that prevents it."""
    try:
        setting.register()
        _ = setting.workspace.encoder, setting.devices or setting.workspace.base
    except Exception as error:
        return sendable(error)
    return None


def _work(parent: Connection, setting: Setting, number: int) -> NoReturn:
    """Run the functions that the parent process sends, one at a time, until it closes the connection."""
    status, workspace = 1, setting.workspace
    try:
        torch.set_num_threads(setting.threads)
        if setting.devices:
            os.environ[DEVICE] = setting.devices[number % len(setting.devices)]
        with observing(Remote(parent)), freed_memory_kept(), suppress(EOFError, ConnectionError):
            while True:
                function, arguments = parent.recv()
                parent.send(_outcome(function, workspace, arguments))
        status = 0
    finally:
        os._exit(status)


def _outcome(function: Callable[..., Any], workspace: Workspace, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "result", function(workspace, *arguments)
    except ConnectionError:
        raise  # the parent process has ended
    except Exception as error:
        return "error", sendable(error)


def sendable(error: Exception) -> Exception:
    """Return an error that another process can read: one of ours, or any other's traceback as text."""
    if isinstance(error, FlexpertsError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
