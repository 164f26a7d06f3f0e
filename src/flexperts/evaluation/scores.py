"""Scores of one model state on one client's test rows: NLL and ROUGE-L."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from flexperts.data.batches import PaddedBatch, pad_batch, pad_responses
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import Answer, greedy_answers, longest_first, prompt_batch
from flexperts.evaluation.words import UnicodeWords, folded
from flexperts.modeling.caches import read_prompts, response_losses
from flexperts.modeling.forward import Precision, autocast, token_losses

SCORES = ("rouge_l", "nll")
"""Names of the scores in files."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the scoring.

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
    """One model state's scores on rows; every tuple is in the order of the rows.

    Where a model's logits are not finite, the row's score is not-a-number. Then there is no mean either: a mean
    over the other rows would look like a mean over all rows.

    Args:
        nlls: Mean NLL of every row's trained tokens, in nats per token: its response, or all answers of a chat.
        tokens: Number of trained tokens of every row.
        points: ROUGE-L F1 of every row, from 0 to 100; empty where no answers were generated.
        predictions: Generated answers; empty where none were generated.
    """

    nlls: tuple[float, ...]
    tokens: tuple[int, ...]
    points: tuple[float, ...] = ()
    predictions: tuple[Answer, ...] = ()

    @property
    def rows(self) -> int:
        """Number of scored rows."""
        return len(self.nlls)

    @property
    def nll(self) -> float | None:
        """Mean response NLL, in nats per token; None if a row's NLL is not finite."""
        return finite_or_none(sum(n * t for n, t in zip(self.nlls, self.tokens, strict=True)) / sum(self.tokens))

    @property
    def rouge_l(self) -> float | None:
        """Mean ROUGE-L F1, in points from 0 to 100; None without answers, or if a row's score is not finite."""
        return finite_or_none(sum(self.points) / len(self.points)) if self.points else None

    @property
    def cut(self) -> int:
        """Number of answers that reached the token limit."""
        return sum(answer.cut for answer in self.predictions)

    def metrics(self) -> dict[str, float | None]:
        """Return the means by name; None where a mean is not finite."""
        return {"rouge_l": self.rouge_l, "nll": self.nll} if self.points else {"nll": self.nll}

    def row(self, index: int) -> dict[str, float | None]:
        """Return one row's numbers by name; None where a number is not finite."""
        points = {"rouge_l": finite_or_none(self.points[index])} if self.points else {}
        return {**points, "nll": finite_or_none(self.nlls[index]), "tokens": self.tokens[index]}


def finite_or_none(value: float | None) -> float | None:
    """Return a finite number, else None: JSON has only finite numbers."""
    return None if value is None or not math.isfinite(value) else value


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the unweighted mean; None if a value is missing, which must not go unnoticed."""
    found = [math.nan if value is None else value for value in values]
    return finite_or_none(float(np.mean(found))) if found else None


def evaluate(
    model: Any,
    encoder: PromptEncoder,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> Scores:
    """Score every row's response, and an answer generated from the row's prompt.

    Of a chat, the NLL is of all answers that are trained; the generated answer is the last one.

    Args:
        model: A causal language model in eval mode, with or without grafts attached.
        encoder: The encoder with which the model is trained.
        rows: The rows, at least one.
        settings: Lengths, batch size, precision, whether to generate.
        on_rows: Called with the number of rows after each batch.
        on_batch: Called with the prompts of every batch before it is computed.
    """
    examples = encoder.encode_all(rows)
    nlls, tokens, predictions = [0.0] * len(rows), [0] * len(rows), [Answer("")] * len(rows)
    for chosen in longest_first([e.prompt for e in examples], settings.batch_size):
        sums, counts, answers = _batch(model, encoder, [examples[i] for i in chosen], settings, on_batch)
        for index, total, count, text in zip(chosen, sums, counts, answers, strict=True):
            nlls[index], tokens[index], predictions[index] = total / count, count, text
        on_rows(len(chosen))
    if not settings.answers:
        return Scores(tuple(nlls), tuple(tokens))
    points = rouge_l(predictions, [_reference(encoder, row, e) for row, e in zip(rows, examples, strict=True)])
    whole = [given.finite and math.isfinite(nll) for given, nll in zip(predictions, nlls, strict=True)]
    points = [value if is_whole else math.nan for value, is_whole in zip(points, whole, strict=True)]
    return Scores(tuple(nlls), tuple(tokens), tuple(points), tuple(predictions))


def _reference(encoder: PromptEncoder, row: Row, example: Example) -> str:
    """Return the text that an answer is compared with; calls of tools are in it as the template writes them."""
    if "assistant" not in row.extras:
        return row.response
    said = example.input_ids[example.prompt_length :]
    ends = said[-1:] == (encoder.end_token,)
    text: str = encoder.tokenizer.decode(said[:-1] if ends else said, skip_special_tokens=True)
    return text.strip()


@torch.no_grad()
def _batch(
    model: Any,
    encoder: PromptEncoder,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    on_batch: Callable[[PaddedBatch], None] | None,
) -> tuple[list[float], list[int], list[Answer]]:
    """Return every row's summed NLL in nats, number of trained tokens, and answer."""
    prompts, pad = prompt_batch([e.prompt for e in examples], encoder), encoder.tokenizer.pad_token_id
    if on_batch:
        on_batch(prompts)
    with autocast(next(model.parameters()).device, settings.precision):
        read = read_prompts(model, prompts)
        if read.can_go_on and not any(e.earlier for e in examples):
            sums, counts = response_losses(model, read, pad_responses(examples, pad))
        else:
            sums, counts = token_losses(model, pad_batch(examples, pad))
        answers = [Answer("")] * len(examples)
        if settings.answers:
            limit = settings.max_new_tokens
            answers = greedy_answers(model, encoder, read, limit, rows_leave=on_batch is None)
    return sums.double().tolist(), counts.tolist(), answers


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=UnicodeWords())


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return each prediction's ROUGE-L F1 against its reference, in points from 0 to 100.

    For a reference without any word, such as ``+`` or an emoji, an equal prediction scores 100 and any other 0.
    """
    return [_points(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]


def _points(prediction: str, reference: str) -> float:
    if not UnicodeWords().tokenize(reference):
        return 100.0 * (bool(reference.strip()) and _signs(prediction) == _signs(reference))
    return float(100.0 * _scorer().score(reference, prediction)["rougeL"].fmeasure)


def _signs(text: str) -> str:
    return "".join(folded(text).split())
