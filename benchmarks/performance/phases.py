"""A program's wall time by phase, measured from outside: functions are wrapped, and each second counts once.

A second belongs to the innermost wrapped function that is running; time outside all of them is ``REST``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

REST = "the rest"


class Clock:
    """Adds up the seconds of phases. One thread's calls only.

    Args:
        now: The clock, in seconds: wall time, or ``time.process_time`` where the machine is busy.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._since = now, now()
        self._running = [REST]
        self._seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        """The original of each wrapped function, by the place where it is looked up."""

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase up to now."""
        self._charge()
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as a phase, except phases within it."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def watch(self, phases: Mapping[str, Sequence[str]]) -> None:
        """Wrap functions permanently.

        Args:
            phases: Phase -> its functions, as ``module:name`` or ``module:Class.name`` where they are looked up.
        """
        for phase, places in phases.items():
            for place in places:
                module, _, path = place.partition(":")
                *owners, name = path.split(".")
                owner: Any = import_module(module)
                for part in owners:
                    owner = getattr(owner, part)
                self.calls[place] = 0
                setattr(owner, name, self._watched(phase, place, getattr(owner, name)))

    def _watched(self, phase: str, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls[place] += 1
            with self.phase(phase):
                made = function(*args, **kwargs)
            return self._around(phase, made) if isinstance(made, AbstractContextManager) else made

        return run

    @contextmanager
    def _around(self, phase: str, block: AbstractContextManager[Any]) -> Iterator[Any]:
        """Count the time of a context before and after its block."""
        with ExitStack() as stack:
            with self.phase(phase):
                value = stack.enter_context(block)
            yield value
            with self.phase(phase):
                stack.close()

    def _charge(self) -> None:
        now = self._now()
        self._seconds[self._running[-1]] += now - self._since
        self._since = now
