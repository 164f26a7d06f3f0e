"""Observers of a run's events; the methods do nothing unless a front end overrides them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["selection", "training", "evaluation"]
"""What a client does in its turn."""


@dataclass(frozen=True)
class TurnState:
    """Where a client's turn is.

    Args:
        client: The client's name.
        phase: What it does.
        text: The same in more detail, such as ``round 3`` or ``global answers``.
        done: Selection: batches; training: optimizer steps; evaluation: rows.
        total: How many there are; 0 if that is not known.
        loss: The last step's training loss, in nats per token.
        tokens: Tokens trained on so far in this turn, without padding.
    """

    client: str
    phase: Phase
    text: str
    done: int
    total: int
    loss: float | None = None
    tokens: int = 0


class Observer:
    """Receiver of a run's events, in the process where they happen. This base class ignores them."""

    def stage(self, text: str) -> None:
        """Handle the start of a new stage of the run."""

    def notice(self, text: str) -> None:
        """Handle a one-line notice of something unexpected that may still be right; each text comes once."""

    def progress(self, task: str, done: int, total: int) -> None:
        """Handle progress: ``done`` of ``total`` units of a task are done."""

    def run(self, name: str) -> None:
        """Handle the start of one run of a comparison."""

    def phase(self, name: str, clients: int, number: int = 0, rounds: int = 0) -> None:
        """Handle the start of a phase, in which the server asks clients; it lasts until the next, or ``round``.

        Args:
            name: joining, training or evaluation.
            clients: How many clients are asked.
            number: The round, from 1; 0 outside of rounds.
            rounds: Number of rounds.
        """

    def turn(self, state: TurnState) -> None:
        """Handle progress in a client's turn; several clients may be in turn. By default it is ``progress``."""
        if state.done:
            self.progress(f"{state.client}: {state.text}", state.done, state.total)

    def turn_ended(self, client: str) -> None:
        """Handle the end of a client's turn."""

    def libraries_draw(self, begin: bool) -> None:
        """Handle that libraries begin, or end, to draw progress bars of their own on the terminal."""

    def follow(self, run: str, line: tuple[str, str, float, float] | None) -> None:
        """Handle where a run in another process is.

        Args:
            run: Its name.
            line: The arguments of a ``progress.Line``; None when it has ended.
        """

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """Handle the table of what trains, what is sent and what stays, before round 1."""

    def chosen(self, client: str, choice: Mapping[str, Sequence[int]]) -> None:
        """Handle a client's choice of experts for its grafts."""

    def refused(self, client: str, reason: str) -> None:
        """Handle a refusal: a client's message is not used, or the client may not take part."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Handle the record of a finished round."""


class Relay(Observer):
    """Observer that passes every event on.

    Args:
        tell: Called with an event's name and arguments.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell

    def stage(self, text: str) -> None:
        """Pass it on."""
        self._tell("stage", text)

    def notice(self, text: str) -> None:
        """Pass it on."""
        self._tell("notice", text)

    def progress(self, task: str, done: int, total: int) -> None:
        """Pass it on."""
        self._tell("progress", task, done, total)

    def run(self, name: str) -> None:
        """Pass it on."""
        self._tell("run", name)

    def phase(self, name: str, clients: int, number: int = 0, rounds: int = 0) -> None:
        """Pass it on."""
        self._tell("phase", name, clients, number, rounds)

    def turn(self, state: TurnState) -> None:
        """Pass it on."""
        self._tell("turn", state)

    def turn_ended(self, client: str) -> None:
        """Pass it on."""
        self._tell("turn_ended", client)

    def libraries_draw(self, begin: bool) -> None:
        """Pass it on."""
        self._tell("libraries_draw", begin)

    def follow(self, run: str, line: tuple[str, str, float, float] | None) -> None:
        """Pass it on."""
        self._tell("follow", run, line)

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """Pass it on."""
        self._tell("split", method, table)

    def chosen(self, client: str, choice: Mapping[str, Sequence[int]]) -> None:
        """Pass it on."""
        self._tell("chosen", client, choice)

    def refused(self, client: str, reason: str) -> None:
        """Pass it on."""
        self._tell("refused", client, reason)

    def round(self, record: Mapping[str, Any]) -> None:
        """Pass it on."""
        self._tell("round", record)


class Observers(Relay):
    """Observer that passes every event to several observers, in order.

    Args:
        observers: The observers.
    """

    def __init__(self, *observers: Observer) -> None:
        super().__init__(self._tell_all)
        self.observers = observers

    def _tell_all(self, event: str, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, event)(*arguments)


class Once(Observers):
    """Observer that passes every event on, but each notice only once."""

    def __init__(self, observer: Observer) -> None:
        super().__init__(observer)
        self._said: set[str] = set()

    def notice(self, text: str) -> None:
        """Pass it on if the text is new."""
        if text not in self._said:
            self._said.add(text)
            super().notice(text)


_current: ContextVar[Observer | None] = ContextVar("observer", default=None)


def current_observer() -> Observer:
    """Return the observer of the run in this context: Flower's apps take no argument for one."""
    return _current.get() or Observer()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Send the events of runs inside the block to ``observer``."""
    token = _current.set(observer)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def libraries_drawing() -> Iterator[None]:
    """Let libraries draw progress bars inside the block: the observer's display pauses."""
    observer = current_observer()
    observer.libraries_draw(True)
    try:
        yield
    finally:
        observer.libraries_draw(False)
