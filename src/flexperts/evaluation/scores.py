"""Scoring one model state on one client's test rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexperts.data.batches import PaddedBatch, pad_batch, pad_responses
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import answer, longest_first, prompt_batch
from flexperts.evaluation.rouge import rouge_l
from flexperts.modeling.forward import Precision, autocast, token_losses
from flexperts.modeling.reading import read_prompts, response_losses

SCORES = ("rouge_l", "nll")
"""Names of the scores, as files hold them."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How test rows are scored.

    Args:
        max_new_tokens: Longest generated answer, in tokens.
        batch_size: Rows per forward pass and per generated batch.
        precision: As in training.
        answers: Whether answers are generated and scored by ROUGE-L.
    """

    max_new_tokens: int
    batch_size: int
    precision: Precision
    answers: bool = True


@dataclass(frozen=True)
class Scores:
    """What one model state scores on rows; every tuple is in the order of the rows.

    Args:
        nlls: Mean response NLL of every row, in nats per token.
        tokens: Response tokens of every row.
        points: ROUGE-L F1 of every row, from 0 to 100; empty where no answers were generated.
        predictions: Generated answers; likewise.
    """

    nlls: tuple[float, ...]
    tokens: tuple[int, ...]
    points: tuple[float, ...] = ()
    predictions: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows were scored."""
        return len(self.nlls)

    @property
    def nll(self) -> float:
        """Mean response NLL, in nats per token."""
        return sum(n * t for n, t in zip(self.nlls, self.tokens, strict=True)) / sum(self.tokens)

    @property
    def rouge_l(self) -> float | None:
        """Mean ROUGE-L F1, in points from 0 to 100; None where no answers were generated."""
        return sum(self.points) / len(self.points) if self.points else None

    def metrics(self) -> dict[str, float]:
        """Return the means that there are, by name."""
        return {k: v for k in SCORES if (v := getattr(self, k)) is not None}

    def row(self, index: int) -> dict[str, float]:
        """Return one row's numbers, by name."""
        points = {"rouge_l": self.points[index]} if self.points else {}
        return {**points, "nll": self.nlls[index], "tokens": self.tokens[index]}


def evaluate(
    model: Any,
    encoder: PromptEncoder,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> Scores:
    """Score every row's response, and an answer generated to its prompt.

    Args:
        model: A causal language model in eval mode, with or without grafts attached.
        encoder: The encoder that the model is trained with.
        rows: At least one.
        settings: Lengths, batch size, precision, whether to generate.
        on_rows: Gets the number of rows after each batch.
        on_batch: Gets the prompts of every batch before it is read.
    """
    examples = encoder.encode_all(rows)
    nlls, tokens, predictions = [0.0] * len(rows), [0] * len(rows), [""] * len(rows)
    for chosen in longest_first([e.prompt for e in examples], settings.batch_size):
        sums, counts, answers = _batch(model, encoder, [examples[i] for i in chosen], settings, on_batch)
        for index, total, count, text in zip(chosen, sums, counts, answers, strict=True):
            nlls[index], tokens[index], predictions[index] = total / count, count, text
        on_rows(len(chosen))
    if not settings.answers:
        return Scores(tuple(nlls), tuple(tokens))
    points = rouge_l(predictions, [row.response for row in rows])
    return Scores(tuple(nlls), tuple(tokens), tuple(points), tuple(predictions))


@torch.no_grad()
def _batch(
    model: Any,
    encoder: PromptEncoder,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    on_batch: Callable[[PaddedBatch], None] | None,
) -> tuple[list[float], list[int], list[str]]:
    """Return every row's NLL in nats, its count of response tokens, and its answer."""
    prompts, pad = prompt_batch([e.prompt for e in examples], encoder), encoder.tokenizer.pad_token_id
    if on_batch:
        on_batch(prompts)
    with autocast(next(model.parameters()).device, settings.precision):
        read = read_prompts(model, prompts)
        if read.can_go_on:
            sums, counts = response_losses(model, read, pad_responses(examples, pad))
        else:
            sums, counts = token_losses(model, pad_batch(examples, pad))
        answers = [""] * len(examples)
        if settings.answers:
            limit = settings.max_new_tokens
            answers = answer(model, encoder, read, limit, rows_leave=on_batch is None)
    return sums.double().tolist(), counts.tolist(), answers
