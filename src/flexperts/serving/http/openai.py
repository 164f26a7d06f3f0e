"""OpenAI's chat format: which requests are accepted or refused, and how replies are written."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self
from uuid import uuid4

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from flexperts.errors import did_you_mean, shown
from flexperts.serving.contract import SMALLEST, ModelName, Sampling
from flexperts.serving.http.refusals import RefusedError, invalid
from flexperts.serving.http.settings import Limits

_HARMLESS = {
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity",
}  # fmt: skip
"""Fields of OpenAI's API that do not change the answers of this server."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields that can change the answer -> the accepted values, which do not; null is always accepted."""


_Stop = Annotated[str, Field(max_length=200)]  # limited, because every token is compared with all stop strings


def _not_tiny(value: float) -> float:
    if 0 < value < SMALLEST:
        raise ValueError(f"it must be 0 or at least {SMALLEST}")
    return value


_Number = Annotated[float, AfterValidator(_not_tiny)]


class _TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]

    @model_validator(mode="after")
    def _check_extras(self) -> Self:
        """Refuse unknown fields that are not empty; answers that callers send back have many empty fields."""
        if unknown := [field for field, value in (self.model_extra or {}).items() if value and field != "name"]:
            raise ValueError(f"{unknown[0][:100]!r} is not supported")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for a chat completion."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: _Number | None = Field(default=None, ge=0, le=2)
    top_p: _Number | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The turns for the engine; OpenAI's newer role "developer" becomes "system"."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.text} for m in self.messages]

    @property
    def bytes(self) -> int:
        """Length of all turns in UTF-8."""
        return sum(len(message.text.encode()) for message in self.messages)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, limits: Limits) -> Sampling:
        """Return how to draw the answer; greedy by default, as in `flexperts generate` and evaluation."""
        wanted = self.max_completion_tokens or self.max_tokens or limits.answer_tokens
        if wanted > limits.answer_tokens:
            rule = f"this server's answers have at most {limits.answer_tokens} tokens"
            raise invalid(f"max_tokens = {wanted}", rule, "ask for fewer tokens, or leave it out", "max_tokens")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_new_tokens=wanted,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
        )


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of a chat request."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from error
    for name, value in (request.model_extra or {}).items():
        _check_extra(name, value)
    return request


def _check_extra(field: str, value: Any) -> None:
    """Refuse an unsupported field, unless it would not change the answer."""
    if field in _HARMLESS or value is None:
        return
    if any(value == only and isinstance(value, bool) == isinstance(only, bool) for only in _ONLY.get(field, ())):
        return
    if field in _ONLY:
        values = " or ".join(map(repr, _ONLY[field]))
        rule = f"it can only be {values}" if values else "it is not supported"
        raise invalid(field, rule, "leave it out", field)
    remedy = did_you_mean(field[:100], [*ChatRequest.model_fields, *_ONLY], "leave it out")
    raise invalid(f"{field[:100]!r}", "there is no such field", remedy, field[:100])


def _explained(error: ValidationError) -> RefusedError:
    """Return the refusal for the most deeply nested error; it repeats numbers, but never texts of the request."""
    found = max(error.errors(include_url=False), key=lambda offence: len(offence["loc"]))
    steps = [str(step) for step in found["loc"] if step != "str" and not str(step).startswith("list[")]
    place, value = ".".join(steps), found["input"]
    told = f" = {shown(value)}" if isinstance(value, int | float) else ""
    rule = found["msg"].removeprefix("Value error, ")
    remedy = "send a JSON object" if found["type"] == "json_invalid" else "send a value that fits this rule"
    return invalid(f"{place}{told}" if place else "the request's body", rule, remedy, place or None)


DONE = b"data: [DONE]\n\n"
"""The end of a stream."""
ALIVE = b": waiting\n\n"
"""A comment in a stream; readers ignore it."""


def event(value: Any) -> bytes:
    """Return a server-sent event with a value as JSON."""
    return f"data: {json.dumps(value)}\n\n".encode()


def usage(prompt: int, generated: int) -> dict[str, int]:
    """Return the token counts of one request."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


@dataclass(frozen=True)
class Completion:
    """The JSON of one answer, whole or in chunks.

    Args:
        model: The model's name.
        id: The answer's id, the same in all chunks.
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
        """Return the chunk after the last part, which contains only the token counts."""
        return self._made("chat.completion.chunk", []) | {"usage": counts}

    def _made(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def model_entry(model: str, states: Sequence[ModelName], since: int) -> dict[str, Any]:
    """Return one entry of the list of models: a client, with the states in which its model can be asked.

    Args:
        model: The requested name, or the client's.
        states: The client's models, the most personal one last.
        since: Unix time in seconds at which the server started.
    """
    asked = {state.state: f"{state.client}@{state.state}" for state in states}
    return {"id": model, "object": "model", "created": since, "owned_by": states[0].client, "states": asked}
