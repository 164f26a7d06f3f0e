"""The JSON of answers and of the list of models, in OpenAI's shapes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from flexperts.serving.contract import ModelName

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""
ALIVE = b": waiting\n\n"
"""A comment in a stream, which readers skip."""


def event(value: Any) -> bytes:
    """Return a server-sent event that holds a value as JSON."""
    return f"data: {json.dumps(value)}\n\n".encode()


def usage(prompt: int, generated: int) -> dict[str, int]:
    """Return the counts of tokens of one request."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


@dataclass(frozen=True)
class Completion:
    """The JSON of one answer, whole or in chunks.

    Args:
        model: The model's name.
        id: Of the answer, the same in all its chunks.
        created: Unix time in seconds.
    """

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, counts: dict[str, int]) -> dict[str, Any]:
        """Return a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return self._made("chat.completion", [choice]) | {"usage": counts}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """Return a part of an answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._made("chat.completion.chunk", [choice])

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """Return the chunk behind the last part, which holds nothing but the counts of tokens."""
        return self._made("chat.completion.chunk", []) | {"usage": counts}

    def _made(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def model_entry(model: str, states: Sequence[ModelName], since: int) -> dict[str, Any]:
    """Return one model of the list: a client's, with the states in which it can be asked.

    Args:
        model: The name that was asked for, or the client's.
        states: The client's models, the most personal one last.
        since: Unix time in seconds at which the server was ready.
    """
    asked = {state.state: f"{state.client}@{state.state}" for state in states}
    return {"id": model, "object": "model", "created": since, "owned_by": states[0].client, "states": asked}
