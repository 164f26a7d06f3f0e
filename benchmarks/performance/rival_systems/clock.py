"""The cost of a round, measured in the system's own process: wall time, and CPU time of all its processes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil


@dataclass
class Clock:
    """Records when rounds begin and end, and what was trained.

    Args:
        rounds: Begin and end (seconds since the epoch) and CPU seconds of every round.
        steps, tokens: Optimizer steps done and tokens trained on, padding left out.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0

    def begin(self) -> None:
        """Begin a round."""
        self._began = time.time(), cpu_seconds()

    def end(self) -> None:
        """End it."""
        wall, cpu = self._began
        self.rounds.append({"began": wall, "ended": time.time(), "cpu": cpu_seconds() - cpu})

    def count(self, steps: int, tokens: int) -> None:
        """Add what a client has trained."""
        self.steps += steps
        self.tokens += tokens


def cpu_seconds() -> float:
    """Return the CPU time of this process, its children, and theirs."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)
