"""Scoring one model state on one client's test rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import generate, prompt_batch
from flexperts.evaluation.rouge import rouge_l
from flexperts.modeling.forward import Precision, autocast, token_losses


@dataclass(frozen=True)
class EvaluationSettings:
    """How test rows are scored.

    Args:
        max_new_tokens: Longest generated answer, in tokens.
        batch_size: Rows per forward pass and per generated batch.
        precision: As in training.
    """

    max_new_tokens: int
    batch_size: int
    precision: Precision


@dataclass(frozen=True)
class Scores:
    """What one model state scores on one client's test rows.

    Args:
        rouge_l: Mean ROUGE-L F1, in points from 0 to 100.
        nll: Mean response NLL, in nats per token.
        rows: Test rows.
        predictions: Generated answers, in the order of the rows.
    """

    rouge_l: float
    nll: float
    rows: int
    predictions: tuple[str, ...]


def evaluate(
    model: Any,
    encoder: PromptEncoder,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> Scores:
    """Generate an answer to every row and score it against the row's response.

    Args:
        model: A causal language model in eval mode, with or without grafts attached.
        encoder: The encoder that the model is trained with.
        rows: Test rows, at least one.
        settings: Lengths, batch size, precision.
        on_rows: Gets the number of rows after each generated batch.
        on_batch: Gets the prompts of every batch before it is generated or scored.
    """
    predictions = generate(
        model,
        encoder,
        [encoder.encode(row).prompt for row in rows],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        precision=settings.precision,
        on_rows=on_rows,
        on_batch=on_batch,
    )
    points = rouge_l(predictions, [row.response for row in rows])
    nll = response_nll(model, encoder, rows, settings, on_batch)
    return Scores(sum(points) / len(points), nll, len(rows), tuple(predictions))


@torch.no_grad()
def response_nll(
    model: Any,
    encoder: PromptEncoder,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> float:
    """Return the mean negative log-likelihood of the rows' responses, in nats per token."""
    examples = sorted(encoder.encode_all(rows), key=lambda e: len(e.input_ids))
    total, tokens = 0.0, 0
    for start in range(0, len(examples), settings.batch_size):
        chosen = examples[start : start + settings.batch_size]
        if on_batch:
            on_batch(prompt_batch([e.prompt for e in chosen], encoder))
        batch = pad_batch(chosen, encoder.tokenizer.pad_token_id)
        with autocast(next(model.parameters()).device, settings.precision):
            sums, counts = token_losses(model, batch)
        total += sums.double().sum().item()
        tokens += int(counts.sum())
    return total / tokens
