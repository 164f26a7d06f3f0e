"""Numbers of requests in progress, by key owner."""

from __future__ import annotations

from collections import Counter

from flexperts.serving.http.keys import OPERATOR
from flexperts.serving.http.refusals import later
from flexperts.serving.http.settings import Limits

_RETRY_AFTER = 2
"""Seconds after which a refused caller may try again."""


class Load:
    """Counter of the requests in progress by key owner; used only on the event loop's thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._active: Counter[str] = Counter()

    def take(self, owner: str, queued: int) -> None:
        """Take a place; ``leave`` gives it back.

        Args:
            owner: Owner of the caller's key.
            queued: Number of requests that already wait.
        """
        if queued >= self._limits.queue:
            raise later(429, f"{queued} waiting requests", "the queue is full", "queue_full", _RETRY_AFTER)
        if owner != OPERATOR and self._active[owner] >= self._limits.per_client:
            raise later(
                429,
                f"{self._active[owner]} requests in progress",
                f"one client may have at most {self._limits.per_client}",
                "rate_limit_exceeded",
                _RETRY_AFTER,
            )
        self._active[owner] += 1

    def leave(self, owner: str) -> None:
        """Give a place back."""
        self._active[owner] -= 1
