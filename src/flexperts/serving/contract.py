"""The interface between engine and HTTP server: names of models, requests, pieces of answers, counters.

This module does not load torch, so the HTTP server and its tests can use it without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from flexperts.config.names import normal
from flexperts.errors import ConfigError, FlexpertsError, did_you_mean

if TYPE_CHECKING:
    from flexperts.methods.kit.method import State

SMALLEST = 1.2e-38
"""The smallest number above 0 that a request may have: smaller ones are 0, or inexact, in the engine's fp32."""
Finish = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: end token or stop string, token limit, cancelled by its caller, or the engine failed."""
Message = Mapping[str, str]
"""One turn of a conversation: ``role`` (system, user, assistant) and ``content``."""


@dataclass(frozen=True)
class ModelName:
    """One client's model in one state; as text ``clinic``, ``clinic@global``, ``clinic@zero_shot``.

    Args:
        client: The client.
        state: zero_shot, global, personalized or chosen.
        floor: Whether the run has a floor: then the text leaves out chosen, else personalized.
    """

    client: str
    state: State
    floor: bool = False

    def __str__(self) -> str:
        own = "chosen" if self.floor else "personalized"
        return self.client if self.state == own else f"{self.client}@{self.state}"


def find_model(text: str, models: Sequence[ModelName]) -> ModelName:
    """Return the model that a text names; a client without a state means its most personal state.

    Args:
        text: ``client`` or ``client@state``.
        models: The available models, each client's most personal state last.
    """
    text = normal(text)
    texts = {model.client: model for model in models}
    texts |= {f"{model.client}@{model.state}": model for model in models}
    if text in texts:
        return texts[text]
    remedy = did_you_mean(text, texts, "choose one of these")
    raise ConfigError(f"model {text!r}", f"the models are {', '.join(map(str, models))}", remedy)


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer's sampling.

    Args:
        max_new_tokens: Longest answer, in tokens.
        temperature: The divisor of the logits; 0 takes the likeliest token.
        top_p: Tokens are drawn from the likeliest ones that together reach this probability.
        seed: Seed of the draws; the same seed gives the same answer, up to rounding. None is a random seed.
        stop: Texts before which the answer ends.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; it never splits a character.

    Args:
        text: The text, possibly empty.
        tokens: Number of generated tokens in this piece.
        finish: Set on the last piece only.
        error: What failed, if ``finish`` is ``error``.
    """

    text: str
    tokens: int
    finish: Finish | None = None
    error: FlexpertsError | None = None


@dataclass(frozen=True)
class Counters:
    """Counters of the engine since its start.

    Args:
        requests: Accepted requests.
        finished: Requests that ended, for any reason.
        failed: Requests that ended with an error.
        prompt_tokens: Prompt tokens read.
        generated_tokens: Generated tokens.
        steps: Forward passes.
        rows: Rows of all forward passes together; ``rows / steps`` is the mean batch size.
        prefills: Forward passes that read prompts.
    """

    requests: int = 0
    finished: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    rows: int = 0
    prefills: int = 0


class RequestHandle(Protocol):
    """A request that the engine has accepted."""

    def cancel(self) -> None:
        """End the request at the next step; a last piece with ``cancelled`` follows, unless it already ended."""


class Engine(Protocol):
    """One resident base that answers for all models of a run; all methods may be called from any thread."""

    @property
    def models(self) -> tuple[ModelName, ...]:
        """The available models, by client, each client's most personal state last."""

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt and its answer may have together."""

    @property
    def counters(self) -> Counters:
        """The engine's counters."""

    @property
    def queue_length(self) -> int:
        """Number of requests that wait for a place in a batch."""

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""

    @property
    def failure(self) -> FlexpertsError | None:
        """Why the engine stopped answering; None while it works."""

    def prompt_tokens(self, messages: Sequence[Message], model: ModelName | None = None) -> list[int]:
        """Return a conversation's tokens, up to where the answer starts.

        Args:
            messages: The turns; the last one is the user's.
            model: Who answers: a client may have a template of its own. None is the run's template.
        """

    def submit(
        self, model: ModelName, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> RequestHandle:
        """Queue a request and return immediately.

        Args:
            model: One of ``models``.
            prompt: Tokens, from ``prompt_tokens``.
            sampling: How to draw the answer.
            on_piece: Called with each piece of the answer, on the engine's thread, so it must be quick. The last
                piece has a finish and always arrives.
        """

    def close(self) -> None:
        """End all requests and free the base."""
