"""What every engine offers: a place where the clients of a run take their turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Self

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.methods.registry import method_class
from flexperts.modeling.quantization import storage_line
from flexperts.observer import current_observer
from flexperts.server.exchange import LazyGrid


class Engine(ABC):
    """Where the clients of a run take their turns; one engine serves several runs on the same rows and base.

    Args:
        workspace: The rows, and the base if it is in memory.
        threads: CPU threads of a client's turn.
    """

    workers = 1
    """Processes in which clients take turns at the same time."""

    def __init__(self, workspace: Workspace, threads: int) -> None:
        self.workspace, self.threads = workspace, threads

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """End what the engine has started."""

    @abstractmethod
    def prepare(self, config: RunConfig, *, needs_experts: bool) -> str:
        """Load the base, refuse settings that would fail in the middle of a run, return the base's fingerprint."""

    @abstractmethod
    def grid(self, config: RunConfig, run: RunDirectory) -> AbstractContextManager[LazyGrid]:
        """Return a run's clients as a grid, for use in a with block."""

    @property
    @abstractmethod
    def peak(self) -> int | None:
        """Peak memory in bytes in the last grid, of the process that needed most; None where it is unknown."""

    @property
    def facts(self) -> dict[str, int]:
        """What a summary says of the engine."""
        return {"workers": self.workers, "threads": self.threads}


def prepare(workspace: Workspace, config: RunConfig, needs_experts: bool) -> str:
    """Do what ``Engine.prepare`` says with the base in this process."""
    for name in filter(None, (config.method.name, config.method.reference)):
        method_class(name)  # a worker cannot import what is only in the parent process's script
    workspace.check(config, needs_experts=needs_experts)
    if config.model.quantization != "none":
        current_observer().stage(storage_line(workspace.base.model))
    return workspace.base.fingerprint
