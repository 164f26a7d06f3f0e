"""Observers of a run's events; the methods do nothing unless a front end overrides them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Observer:
    """Receiver of a run's events, in the process where they happen. This base class ignores them."""

    def stage(self, text: str) -> None:
        """Handle the start of a new stage of the run."""

    def notice(self, text: str) -> None:
        """Handle a one-line notice of something unexpected that may still be right; each text comes once."""

    def progress(self, task: str, done: int, total: int) -> None:
        """Handle progress: ``done`` of ``total`` units of a task are done."""

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """Handle the table of what trains, what is sent and what stays, before round 1."""

    def chosen(self, client: str, choice: Mapping[str, Sequence[int]]) -> None:
        """Handle a client's choice of experts for its grafts."""

    def refused(self, client: str, reason: str) -> None:
        """Handle a refusal: a client's message is not used, or the client may not take part."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Handle the record of a finished round."""


class Observers(Observer):
    """Observer that passes every event to several observers, in order.

    Args:
        observers: The observers.
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
