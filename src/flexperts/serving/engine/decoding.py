"""Decoding of one answer: its tokens are drawn, turned into pieces of text, and checked for the end."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from flexperts.errors import ConfigError
from flexperts.serving.contract import SMALLEST, Finish, Piece, Sampling

_COLD = 1e-4
"""Temperature below which the likeliest token is taken: no other has a chance, and logits would overflow."""


def check_sampling(sampling: Sampling) -> None:
    """Refuse values that are out of range."""
    wrong = [
        (f"max_tokens = {sampling.max_new_tokens}", "at least 1", sampling.max_new_tokens >= 1),
        (
            f"temperature = {sampling.temperature}",
            f"0, or a number of at least {SMALLEST}",
            sampling.temperature == 0 or SMALLEST <= sampling.temperature < math.inf,
        ),
        (f"top_p = {sampling.top_p}", f"at least {SMALLEST} and at most 1", SMALLEST <= sampling.top_p <= 1),
        (f"stop = {list(sampling.stop)}", "texts that are not empty", all(sampling.stop)),
    ]
    for value, rule, holds in wrong:
        if not holds:
            raise ConfigError(value, f"it must be {rule}", "send a value in this range, or leave it out")


class Decoding:
    """The tokens and the text of one answer.

    Args:
        tokenizer: Turns tokens into text.
        ends: Tokens that end an answer.
        sampling: How tokens are drawn; ``max_new_tokens`` must fit the context.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], sampling: Sampling) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._ends, self._sampling = tokenizer, ends, sampling
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []
        self._waiting, self._sent_tokens = "", 0
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self._sampling.temperature < _COLD

    def draw(self, logits: Tensor) -> int:
        """Return a token drawn from fp32 ``logits [V]`` on the CPU; an answer's draws depend only on its seed."""
        chances = (logits / self._sampling.temperature).softmax(-1)
        if self._sampling.top_p < 1:
            chances = nucleus(chances, self._sampling.top_p)
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def chance(self) -> tuple[float, float, float]:
        """Return temperature, ``top_p`` and the next uniform number of the answer's stream."""
        drawn = float(torch.rand((), generator=self._generator))
        return self._sampling.temperature, self._sampling.top_p, drawn

    def take(self, token: int) -> Piece | None:
        """Add a token; return the next piece of text, or None while there is none."""
        self.tokens.append(token)
        finish = self._finish()
        if token not in self._ends:
            self._waiting += self._next(token)
        if finish:
            self._waiting += self._rest()
        if (cut := _first(self._sampling.stop, self._waiting)) is not None:
            return self._piece(cut, "stop")
        return self._piece(len(self._waiting) if finish else _settled(self._waiting, self._sampling.stop), finish)

    def _next(self, token: int) -> str:
        """Return the text that a token adds; empty while a character is incomplete."""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # after an invalid byte, the decoder's text no longer starts with what was already sent
            text, self._stream = self._rest(), DecodeStream([token], skip_special_tokens=True)
        if text is not None:
            self._held = []
        return text or ""

    def _rest(self) -> str:
        """Return the text of tokens that have given no text yet, even of half a character."""
        held, self._held = self._held, []
        text: str = self._tokenizer.decode(held, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _finish(self) -> Finish | None:
        if self.tokens[-1] in self._ends:
            return "stop"
        return "length" if len(self.tokens) >= self._sampling.max_new_tokens else None

    def _piece(self, length: int, finish: Finish | None) -> Piece | None:
        if not length and not finish:
            return None
        text, self._waiting = self._waiting[:length], self._waiting[length:]
        tokens, self._sent_tokens = len(self.tokens) - self._sent_tokens, len(self.tokens)
        return Piece(text, tokens, finish)


def draw_together(answers: Sequence[Decoding], logits: Tensor) -> Tensor:
    """Return a token for each row of fp32 ``logits [B, V]``, ``[B]``, drawn on their device without a wait for it.

    Each answer's uniform number is looked up in its row's cumulative distribution, the likeliest tokens first.
    Where that is not finite, the token is -1.
    """
    temperature, top_p, drawn = torch.tensor([a.chance() for a in answers], device=logits.device).T.unsqueeze(-1)
    ordered, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    together = ordered.cumsum(-1)
    place = torch.searchsorted(together, drawn * together[:, -1:], right=True)
    last = (ordered > 0).sum(-1, keepdim=True) - 1  # rounding may lead beyond it
    chosen: Tensor = tokens.gather(-1, place.minimum(last).clamp(min=0)).where(together[:, -1:].isfinite(), -1)
    return chosen.squeeze(-1)


def nucleus(chances: Tensor, top_p: float) -> Tensor:
    """Return ``chances [V]``, set to 0 for all but the likeliest tokens that together reach ``top_p``."""
    ordered, tokens = chances.sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(chances).scatter(-1, tokens, ordered.masked_fill(beyond, 0.0))


def _first(stop: Sequence[str], text: str) -> int | None:
    """Return the position of the first stop string in a text, or None."""
    return min((place for s in stop if (place := text.find(s)) >= 0), default=None)


def _settled(text: str, stop: Sequence[str]) -> int:
    """Return how much of a text can be sent: without an end that may be the start of a stop string."""
    starts = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return len(text) - max(starts, default=0)
