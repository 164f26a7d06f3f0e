"""How a run tells what it is doing: an observer with methods that do nothing unless a front end fills them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Observer:
    """Receives a run's events in the process where they happen. The default ignores them all."""

    def stage(self, text: str) -> None:
        """A new stage of the run begins."""

    def notice(self, text: str) -> None:
        """Something that may be right but surprises, in one line; it is told once."""

    def progress(self, task: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of a task are done."""

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """What trains, what is sent and what stays, before round 1."""

    def chosen(self, client: str, choice: Mapping[str, Sequence[int]]) -> None:
        """A client has selected the experts it grafts."""

    def refused(self, client: str, reason: str) -> None:
        """What a client sent is not used, or it may not take part."""

    def round(self, record: Mapping[str, Any]) -> None:
        """A round has finished."""


class Observers(Observer):
    """Passes every event on to several observers, one after the other.

    Args:
        observers: Who gets the events.
    """

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def stage(self, text: str) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.stage(text)

    def notice(self, text: str) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.notice(text)

    def progress(self, task: str, done: int, total: int) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.progress(task, done, total)

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.split(method, table)

    def chosen(self, client: str, choice: Mapping[str, Sequence[int]]) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.chosen(client, choice)

    def refused(self, client: str, reason: str) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.refused(client, reason)

    def round(self, record: Mapping[str, Any]) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.round(record)


class Once(Observers):
    """Passes every event on, and of what surprises each text once."""

    def __init__(self, observer: Observer) -> None:
        super().__init__(observer)
        self._said: set[str] = set()

    def notice(self, text: str) -> None:
        """Pass it on when it comes for the first time."""
        if text not in self._said:
            self._said.add(text)
            super().notice(text)


_current: ContextVar[Observer | None] = ContextVar("observer", default=None)


def current_observer() -> Observer:
    """Return the observer of the run in this context: Flower's apps take no argument for one."""
    return _current.get() or Observer()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Let ``observer`` receive the events of runs inside the block."""
    token = _current.set(observer)
    try:
        yield
    finally:
        _current.reset(token)
