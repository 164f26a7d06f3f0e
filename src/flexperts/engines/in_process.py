"""The engine without other processes: clients take turns on the base in this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch
from flwr.app import RecordDict

from flexperts.artifacts import RunDirectory
from flexperts.client.answer import answer, read_ahead
from flexperts.client.client import Resident
from flexperts.config.run import RunConfig
from flexperts.engines.engine import Engine, prepare
from flexperts.engines.grid import InProcessGrid
from flexperts.modeling.memory import freed_memory_kept, peak_bytes, reset_peak
from flexperts.server.exchange import LazyGrid


class InProcess(Engine):
    """Clients take turns in this process; see ``Engine``."""

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._before)

    def prepare(self, config: RunConfig, *, needs_experts: bool) -> str:
        """See ``Engine``."""
        return prepare(self.workspace, config, needs_experts)

    @contextmanager
    def grid(self, config: RunConfig, run: RunDirectory) -> Iterator[LazyGrid]:
        """See ``Engine``."""
        resident = Resident(self.workspace, config, run.path)
        reset_peak(resident.model.device)
        try:
            with freed_memory_kept():
                clients = dict(enumerate(self.workspace.clients, 1))
                nodes = {number: partial(_answer, resident, name) for number, name in clients.items()}
                ahead = {number: partial(_read_ahead, resident, name) for number, name in clients.items()}
                # A CPU is busy with the turn itself.
                yield InProcessGrid(nodes, ahead if resident.model.device.type == "cuda" else None)
        finally:
            resident.model.close()

    @property
    def peak(self) -> int | None:
        """See ``Engine``."""
        return peak_bytes(self.workspace.base.model.device)


def _read_ahead(resident: Resident, name: str, kind: str, content: RecordDict) -> None:
    read_ahead(kind, content, resident.client(name))


def _answer(resident: Resident, name: str, kind: str, content: RecordDict) -> RecordDict:
    return answer(kind, content, resident.client(name))
