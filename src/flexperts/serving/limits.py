"""How much the server takes on; nothing here loads anything, so the command line can show the defaults."""

from __future__ import annotations

from dataclasses import dataclass


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
