"""Who has how many requests in work."""

from __future__ import annotations

from collections import Counter

from flexperts.serving.http.keys import OPERATOR
from flexperts.serving.http.refusals import later
from flexperts.serving.http.settings import Limits

_RETRY_AFTER = 2
"""Seconds after which a caller who found no place may try again."""


class Load:
    """Counts the requests in work by who asked, on the event loop's thread alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._active: Counter[str] = Counter()

    def take(self, owner: str, queued: int) -> None:
        """Take a place, to be given back by ``leave``.

        Args:
            owner: Whose key asks.
            queued: Requests that wait already.

        Raises:
            RefusedError: There is none.
        """
        if queued >= self._limits.queue:
            raise later(429, f"{queued} waiting requests", "the queue is full", "queue_full", _RETRY_AFTER)
        if owner != OPERATOR and self._active[owner] >= self._limits.per_client:
            raise later(
                429,
                f"{self._active[owner]} requests in work",
                f"one client may have {self._limits.per_client}",
                "rate_limit_exceeded",
                _RETRY_AFTER,
            )
        self._active[owner] += 1

    def leave(self, owner: str) -> None:
        """Give a place back."""
        self._active[owner] -= 1
