"""Workers on Ray: the actors of Flower's simulation runtime, on this machine or on a cluster.

Every actor loads the base itself. The rows come from this process; base and run directory have the same paths on
every machine. With ``RAY_ADDRESS`` the actors are on that cluster, and without it on this machine.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexperts.client.workspace import Workspace
from flexperts.config.run import EngineConfig
from flexperts.engines.flower_private import actor_pool
from flexperts.engines.fork_server import Remote, Setting, sendable
from flexperts.engines.pool import AHEAD, Call
from flexperts.errors import ArtifactError, ConfigError, FederationError, one_line, optional
from flexperts.modeling.placement import computing_device
from flexperts.observer import current_observer, observing

ADDRESS = "RAY_ADDRESS"
"""Environment variable with the address of a Ray cluster; it is Ray's own."""
_REACHED = 10.0
"""Seconds in which a cluster must answer."""
_DEATHS = {"max_restarts": -1, "max_task_retries": 1}
"""Ray's options for actors that die."""


def actors_for(workspace: Workspace, engine: EngineConfig, most: int, folder: Path) -> Actors:
    """Return the actors that a recipe's ``[engine]`` asks for; see ``pool_for``."""
    on_cards, cores = computing_device(workspace.config.model.device).type == "cuda", torch.get_num_threads()
    here = torch.cuda.device_count() if on_cards else cores
    open_count = most if _is_cluster() else min(most, here)
    count = open_count if engine.workers == "auto" else engine.workers
    setting = Setting(workspace, engine.threads or max(1, cores // count))
    return Actors(setting, count, cards=on_cards, folder=folder)


def _is_cluster() -> bool:
    """Return whether the environment names a cluster."""
    return bool(os.environ.get(ADDRESS))


class Actors:
    """Actors that run calls, until ``close``; see ``Pool``, which has the same methods.

    Args:
        setting: What they work with; each has that many CPU cores, or threads.
        most: Most actors; there are fewer where fewer fit.
        cards: Whether each has a card of its own.
        folder: The run directory, or another folder that all machines share.

    Raises:
        ConfigError: Ray is not installed, or this process uses it already.
        FederationError: There is no cluster at the address, or no machine of it has room for an actor.
    """

    def __init__(self, setting: Setting, most: int, *, cards: bool, folder: Path) -> None:
        with optional("ray", "the engine ray"):
            import ray
        if ray.is_initialized():
            rule = "this process uses it already"
            raise ConfigError("Ray", rule, f"call ray.shutdown() first; {ADDRESS} names the cluster to use")
        self.setting, self._ray, self._running = setting, ray, list[Any]()
        # Machines with another file system do not have this file; the next run removes it if this one is killed.
        self._mark = tempfile.NamedTemporaryFile(dir=folder.resolve(), prefix=".", suffix=".part")  # noqa: SIM115
        try:
            with _undisturbed():
                _connect(ray, None if cards else 0, most * setting.threads)
            begin = partial(_begin, setting, Path.cwd(), Path(self._mark.name))
            options = {"num_cpus": setting.threads, "num_gpus": int(cards)}
            try:
                self._pool = actor_pool(options | _DEATHS, begin)
            except ValueError as error:
                raise FederationError(
                    f"an actor with {options['num_cpus']} cores and {options['num_gpus']} cards",
                    "no machine of the Ray cluster has room for one",
                    "lower engine.threads, or add a machine",
                ) from error
        except BaseException:
            self.close()
            raise
        self.count = min(most, self._pool.actors_capacity)
        self._pool.add_actors_to_pool(self.count)

    def close(self) -> None:
        """End all actors, and Ray if it is on this machine."""
        with _undisturbed():
            self._ray.shutdown()
        self._mark.close()

    def results(self, calls: Iterable[Call]) -> Iterator[Any]:
        """Yield the calls' results in their order; a call is taken from the iterable when an actor is free for it.

        Results that wait for an earlier one are in Ray's object store. A call whose actor dies is repeated once.

        Raises:
            FederationError: An actor died in the same call again, or Ray lost the result.
            Exception: A call raised it; one that is not this package's is a ``RuntimeError`` with its traceback.
        """
        calls, order = iter(calls), deque[tuple[Call, Any]]()
        while True:
            while self._pool.is_actor_available() and len(order) < AHEAD * self.count:
                if (call := next(calls, None)) is None:
                    break
                order.append((call, self._submitted(call)))
            if not order:
                return
            if order[0][1] in self._running:
                self._wait()
            else:
                yield self._result(*order.popleft())

    def _submitted(self, call: Call) -> Any:
        """Give a call to an actor that is free, and return Ray's reference to its result."""
        job = _client_app, (call.function, call.arguments), call.what, None
        reference = self._pool.submit(lambda actor, *arguments: actor.run.remote(*arguments), job)
        self._running.append(reference)
        return reference

    def _wait(self) -> None:
        """Wait until an actor is free."""
        [ended], self._running = self._ray.wait(self._running)
        self._pool.add_actor_back_to_pool(ended)

    def _result(self, call: Call, reference: Any) -> Any:
        try:
            _, (kind, value, events), _ = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise FederationError(
                f"{call.what}: Ray gives no result",
                one_line(str(error)),
                "see Ray's log on that machine; use fewer workers if memory is short, and resume",
            ) from error
        for _, name, *arguments in events:
            getattr(current_observer(), name)(*arguments)
        if kind == "error":
            raise value
        return value


class _Events(list[Any]):
    """What happened in a call."""

    def send(self, event: Any) -> None:
        self.append(event)


_told = _Events()
_observer = Remote(_told)
"""In an actor: one observer for all its calls, because a client keeps the one that it was made with."""


def _client_app() -> Callable[..., tuple[str, Any, list[Any]]]:
    """Return what Flower's actor calls in the place of a client app."""
    return _run


def _run(message: tuple[Callable[..., Any], tuple[Any, ...]], context: None) -> tuple[str, Any, list[Any]]:
    """Run a function in an actor; an error is a result, because Flower keeps an error's text only."""
    function, arguments = message
    _told.clear()
    try:
        with observing(_observer):
            return "result", function(_ready().workspace, *arguments), list(_told)
    except Exception as error:
        return "error", sendable(error), list(_told)


_begun: tuple[Setting, Path, Path]
"""In an actor: what it works with, the directory of relative paths, and a file that all machines see."""


def _begin(setting: Setting, directory: Path, mark: Path) -> None:
    global _begun
    _begun = setting, directory, mark
    setting.register()


def _ready() -> Setting:
    setting, directory, mark = _begun
    if not mark.exists():
        raise ArtifactError(
            f"{mark.parent}",
            "an actor on another machine does not see this run directory",
            "give --out on a file system that all machines of the Ray cluster share",
        )
    with suppress(FileNotFoundError):
        os.chdir(directory)
    torch.set_num_threads(setting.threads)
    return setting


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep Ray's start and end from changing the handler of SIGTERM, and from warning."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if in_main:
                signal.signal(signal.SIGTERM, before)


def _connect(ray: Any, cards: int | None, cores: int) -> None:
    """Connect to the cluster that the environment names, or start Ray on this machine with so many cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get(ADDRESS) or "local"
    size = {} if _is_cluster() else {"num_cpus": cores, "num_gpus": cards}
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED).close()
        ray.init(address, **size, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise FederationError(
            f"Ray at {address}", one_line(str(error)), f"start the cluster, or unset {ADDRESS} to use this machine"
        ) from error
