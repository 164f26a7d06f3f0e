"""Batches: rows join with their prompts, get one token per step, and leave when they end.

Shapes: B rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexperts.data.prompts import PromptEncoder
from flexperts.errors import FlexpertsError, ServingError
from flexperts.evaluation.generation import prompt_batch
from flexperts.modeling.caches import Sharing, append_rows, select_rows, sharing
from flexperts.modeling.forward import Precision, autocast, next_logits
from flexperts.serving.contract import ModelName, Piece
from flexperts.serving.engine.decoding import Decoding, draw_together
from flexperts.serving.engine.lanes import Lane


class RequestState:
    """An accepted request, until its last piece.

    Args:
        model: The model that answers.
        prompt: The prompt's tokens.
        answer: The answer so far.
        most_tokens: Most tokens that prompt and answer can have together.
        on_piece: Called with the answer's pieces.
    """

    def __init__(
        self,
        model: ModelName,
        prompt: Sequence[int],
        answer: Decoding,
        most_tokens: int,
        on_piece: Callable[[Piece], None],
    ) -> None:
        self.model, self.prompt, self.answer, self.most_tokens = model, tuple(prompt), answer, most_tokens
        self.cancelled = self.ended = False
        self._on_piece = on_piece

    def cancel(self) -> None:
        """End the request at the next step."""
        self.cancelled = True

    def advance(self, logits: Tensor, token: int) -> None:
        """Take the next token, on a CPU drawn from ``logits [V]``; a failure here ends only this row."""
        try:
            if logits.device.type == "cpu" and not self.answer.is_greedy:
                token = self.answer.draw(logits)
            if token < 0:
                raise ServingError("the next token", "its chances are not finite numbers", "use other weights")
            if piece := self.answer.take(token):
                self._send(piece)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._send(Piece("", 0, "error", _told(error)))

    def drop(self) -> None:
        """End a cancelled request."""
        self._send(Piece("", 0, "cancelled"))

    def _send(self, piece: Piece) -> None:
        if self.ended:
            return
        self.ended = piece.finish is not None
        try:
            self._on_piece(piece)
        except Exception:  # the caller does not listen any more
            self.cancelled = True


class Batch:
    """Rows of one lane.

    Args:
        model: The base.
        lane: Sets the base up for the rows; it must be open.
        encoder: Supplies the pad token.
        precision: As in training.
    """

    def __init__(self, model: Any, lane: Lane, encoder: PromptEncoder, precision: Precision) -> None:
        self.rows: list[RequestState] = []
        self.lane = lane
        self._model, self._encoder, self._precision = model, encoder, precision
        self._device = next(model.parameters()).device
        self._cache: Any = None
        self._mask = torch.empty(0, 0, dtype=torch.long)
        self._padded = False

    @torch.no_grad()
    def add(self, rows: Sequence[RequestState]) -> None:
        """Read the prompts of new rows and take their first tokens; the cache must allow new rows."""
        prompts = prompt_batch([row.prompt for row in rows], self._encoder)
        self.lane.read(prompts)
        self.lane.select([row.model for row in rows])
        mask, padded = prompts.attention_mask.to(self._device), prompts.padded
        logits, cache = self._forward(prompts.input_ids.to(self._device), mask, None, padded)
        if self.rows:
            append_rows(self._cache, cache)
            columns = max(mask.shape[1], self._mask.shape[1])
            self._mask = torch.cat([_widened(self._mask, columns), _widened(mask, columns)])
            self._padded = True  # as a rule, and always right
        else:
            self._cache, self._mask, self._padded = cache, mask, padded
        self.rows += rows
        _advance(rows, logits)
        self._settle()

    @torch.no_grad()
    def step(self) -> None:
        """Take one more token for every row."""
        last = torch.tensor([[row.answer.tokens[-1]] for row in self.rows], device=self._device)
        self._mask = torch.cat([self._mask, torch.ones_like(last)], dim=1)
        logits, self._cache = self._forward(last, self._mask, self._cache, self._padded)
        _advance(self.rows, logits)
        self._settle(changed=False)

    def leave(self) -> list[RequestState]:
        """Remove all rows from the batch without ending them, and return them."""
        rows, self.rows, self._cache = self.rows, [], None
        return rows

    def _settle(self, changed: bool = True) -> None:
        """Remove rows that have ended, and set the lane up for the others."""
        for row in self.rows:
            if row.cancelled:
                row.drop()
        stay = [number for number, row in enumerate(self.rows) if not row.ended]
        if len(stay) < len(self.rows):
            self._keep(stay)
            changed = True
        if changed and self.rows:
            self.lane.select([row.model for row in self.rows])

    def _keep(self, numbers: Sequence[int]) -> None:
        self.rows = [self.rows[number] for number in numbers]
        if not self.rows:
            self._cache = None
            return
        index = torch.tensor(numbers, device=self._device)
        mask = self._mask[index]
        cut = int(mask.any(0).int().argmax()) if sharing(self._cache) == "any time" else 0
        self._mask = mask[:, cut:]
        select_rows(self._cache, index, cut)

    def _forward(self, input_ids: Tensor, mask: Tensor, cache: Any, padded: bool) -> tuple[Tensor, Any]:
        with autocast(self._device, self._precision):
            return next_logits(self._model, input_ids, mask, cache, padded)


def _advance(rows: Sequence[RequestState], logits: Tensor) -> None:
    tokens = logits.argmax(-1)
    drawing = [number for number, row in enumerate(rows) if not row.answer.is_greedy]
    if drawing and logits.device.type != "cpu":
        these = torch.tensor(drawing, device=logits.device)
        tokens[these] = draw_together([rows[number].answer for number in drawing], logits[these])
    for row, own, token in zip(rows, logits, tokens.tolist(), strict=True):
        row.advance(own, token)


def _widened(mask: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(mask, (columns - mask.shape[1], 0))


def _told(error: Exception) -> FlexpertsError:
    """Return an error with value, rule and remedy; messages of other exceptions may quote a prompt."""
    if isinstance(error, FlexpertsError):
        return error
    return ServingError("the answer", f"computing it failed ({type(error).__name__})", "send the request again")


@torch.no_grad()
def probe(model: Any) -> Sharing:
    """Return when rows may share a model's cache, found out with one token."""
    token = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    return sharing(next_logits(model, token, token)[1])
