"""Where a run is: lines that a display shows, from the run's events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flexperts.observer import Observer, TurnState

_WINDOW = 30.0
"""Seconds over which tokens per second are measured."""
_UNITS = {"selection": "batches", "training": "steps", "evaluation": "rows"}


@dataclass(frozen=True)
class Line:
    """One line of a display.

    Args:
        text: What is under way.
        facts: Counts, loss, times.
        done: Position of the bar.
        total: Its end; 0 if that is not known.
    """

    text: str
    facts: str
    done: float = 0.0
    total: float = 0.0

    def __str__(self) -> str:
        """Return the line without a bar."""
        return f"{self.text}: {self.facts}"


class RunProgress(Observer):
    """Observer that keeps where a run is; one thread sends events, others may read the lines.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._title = ""
        self._stage, self._since = "starting", clock()
        self._phase: _Phase | None = None
        self._rounds: tuple[int, float] | None = None
        """The first round that was seen, and when its training began."""
        self._turns: dict[str, TurnState] = {}
        self._tasks: dict[str, Line] = {}

    def run(self, name: str) -> None:
        """Name the run in its lines."""
        self._title = f"{name}, "

    def stage(self, text: str) -> None:
        """Show the stage while no phase lasts."""
        self._stage, self._since, self._tasks = text, self._clock(), {}
        if self._phase is None:
            self._turns = {}

    def progress(self, task: str, done: int, total: int) -> None:
        """Show a task until it is done."""
        self._tasks.pop(task, None)
        if done < total:
            self._tasks[task] = Line(task, f"{done} of {total}", done, total)

    def phase(self, name: str, clients: int, number: int = 0, rounds: int = 0) -> None:
        """Begin a phase."""
        now = self._clock()
        if name == "joining":  # another run begins
            self._rounds = None
        elif number and self._rounds is None:
            self._rounds = number, now
        self._phase, self._turns = _Phase(name, clients, number, rounds, now), {}

    def turn(self, state: TurnState) -> None:
        """Show the turn, and add its loss and tokens to the phase's."""
        if self._phase is None:  # clients work one after the other
            self._turns = {state.client: state}
        else:
            self._phase.count(self._turns.get(state.client), state, self._clock())
            self._turns[state.client] = state

    def turn_ended(self, client: str) -> None:
        """Remove the turn, and count its client as done."""
        self._turns.pop(client, None)
        if self._phase is not None:
            self._phase.ended.add(client)

    def round(self, record: Mapping[str, Any]) -> None:
        """End the round's last phase."""
        self._phase, self._turns, self._stage = None, {}, ""

    def lines(self) -> list[Line]:
        """Return the run's line, and one for each turn and task under way."""
        turns = list(self._turns.values())
        return [*self._of_run(turns), *map(_of_turn, turns), *self._tasks.values()]

    def _of_run(self, turns: list[TurnState]) -> list[Line]:
        now, phase = self._clock(), self._phase
        if phase is None:
            elapsed = duration(now - self._since)
            return [Line(f"{self._title}{self._stage}", elapsed)] if self._stage else []
        # A client selects experts in its first training, or when it joins.
        name = "selection" if turns and all(t.phase == "selection" for t in turns) else phase.name
        where = f"round {phase.number} of {phase.rounds}, " if phase.number else ""
        share = phase.share(turns)
        left = self._left(phase, share, now)
        facts = [f"{len(phase.ended)} of {phase.clients} clients", *phase.facts(now)]
        facts.append(duration(now - phase.since) if left is None else f"ETA {duration(left)}")
        return [Line(f"{self._title}{where}{name}", ", ".join(facts), share * phase.clients, phase.clients)]

    def _left(self, phase: _Phase, share: float, now: float) -> float | None:
        """Return the seconds that the rounds will still take; None if that cannot be told yet.

        The evaluation after the last round is only part of it once it has begun.
        """
        if not share:
            return None
        rest = (now - phase.since) / share * (1 - share)
        if not phase.number or self._rounds is None:
            return rest
        first, began = self._rounds
        later = phase.rounds - phase.number
        if phase.name == "training":
            return (now - began) / (phase.number - first + share) * (later + 1 - share)
        return rest + (phase.since - began) / (phase.number - first + 1) * later


@dataclass
class _Phase:
    """A phase that lasts; see ``Observer.phase``."""

    name: str
    clients: int
    number: int
    rounds: int
    since: float

    def __post_init__(self) -> None:
        self.ended: set[str] = set()
        self._losses: dict[str, float] = {}
        self._tokens: deque[tuple[float, int]] = deque()
        """(time, tokens that were trained on before it), since a time at least ``_WINDOW`` ago."""

    def count(self, before: TurnState | None, state: TurnState, now: float) -> None:
        """Count what a turn has done since ``before``."""
        if state.phase != "training":
            return
        if state.loss is not None:
            self._losses[state.client] = state.loss
        known = before.tokens if before is not None and before.phase == "training" else 0
        total = self._tokens[-1][1] if self._tokens else 0
        self._tokens.append((now, total + max(0, state.tokens - known)))
        while len(self._tokens) > 2 and self._tokens[1][0] <= now - _WINDOW:
            self._tokens.popleft()

    def share(self, turns: list[TurnState]) -> float:
        """Return the share of the phase's work that is done, from 0 to 1."""
        partly = sum(t.done / t.total for t in turns if t.phase == self.name and t.total)
        return min(1.0, (len(self.ended) + partly) / self.clients) if self.clients else 0.0

    def facts(self, now: float) -> list[str]:
        """Return the mean loss of the clients that have trained, and the tokens per second."""
        losses, facts = list(self._losses.values()), []
        if losses:
            facts.append(f"loss {sum(losses) / len(losses):.3f}")
        if self._tokens:
            (began, before), (_, after) = self._tokens[0], self._tokens[-1]
            if after > before and now > began:
                facts.append(f"{(after - before) / (now - began):,.0f} tokens/s")
        return facts


def _of_turn(state: TurnState) -> Line:
    text = state.phase if state.text == state.phase else f"{state.phase}, {state.text}"
    of = f" of {state.total}" if state.total else ""
    loss = "" if state.loss is None else f", loss {state.loss:.3f}"
    facts = f"{state.done}{of} {_UNITS[state.phase]}{loss}"
    return Line(f"  {state.client}: {text}", facts, state.done, state.total)


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: 0:01:30."""
    return str(timedelta(seconds=round(seconds)))
