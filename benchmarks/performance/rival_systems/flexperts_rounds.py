"""flexperts itself, with the method that the work names, as `flexperts run` does it.

The run is stopped when the last measured round is written: the round after it and its scoring are not
part of the work. Everything else of a round is included: the search for personal bytes in what is sent, the
clients' state on disk, the checkpoint and the journal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clock import Clock
from torch import Tensor
from work import Work

from flexperts.engines.run import run_federation
from flexperts.observer import Observer
from flexperts.server.checkpoint import load_server


class RoundsDoneError(Exception):
    """All rounds that are measured are done."""


class Watch(Observer):
    """Tells the clock when rounds begin and end.

    Args:
        clock: The clock.
        rounds: How many are measured.
    """

    def __init__(self, clock: Clock, rounds: int) -> None:
        self.clock, self.rounds = clock, rounds

    def stage(self, text: str) -> None:
        """Begin a round when the run says so."""
        if text.startswith("round "):
            self.clock.begin()

    def round(self, record: Mapping[str, Any]) -> None:
        """End it, and the run after the last one."""
        self.clock.end()
        for told in record["clients"].values():
            self.clock.count(told["steps"], told["tokens"])
        if record["number"] == self.rounds:
            raise RoundsDoneError


def run(work: Work, clock: Clock) -> dict[str, Tensor]:
    """Run the rounds and return the averaged adapter."""
    with tempfile.TemporaryDirectory() as folder:
        with suppress(RoundsDoneError):
            run_federation(work.config, Path(folder), Watch(clock, work.rounds))
        return averaged(Path(folder))


def averaged(folder: Path) -> dict[str, Tensor]:
    """Return a run's final shared weights."""
    return load_server(folder / "checkpoint.safetensors").shared.tensors()
