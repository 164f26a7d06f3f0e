"""Who has how many requests in work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from flexperts.serving.http.keys import OPERATOR
from flexperts.serving.http.refusals import later

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


@dataclass(frozen=True)
class Limits:
    """Bounds of requests.

    Args:
        queue: Requests that may wait for a place in a batch.
        per_client: Requests that one client's keys together may have in work; the operator's are not counted.
        answer_tokens: Longest answer that may be asked for, and the default.
        prompt_tokens: Longest prompt; None leaves it to the context.
        body_bytes: Longest request body.
        seconds: Longest time from a request to the end of its answer.
    """

    queue: int = 64
    per_client: int = 8
    answer_tokens: int = 512
    prompt_tokens: int | None = None
    body_bytes: int = 1 << 20
    seconds: float = 300.0
