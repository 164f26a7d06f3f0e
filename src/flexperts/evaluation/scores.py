"""Scores of one model state on one client's test rows: NLL and ROUGE-L, and rewards on preference rows.

The reward of an answer y is beta (log p(y | x) - log p_base(y | x)), as in DPO; a row's margin is the reward of the
chosen answer minus that of the rejected one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from flexperts.data.batches import PaddedBatch, pad_batch, pad_responses
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import Answer, greedy_answers, longest_first, prompt_batch
from flexperts.evaluation.words import UnicodeWords, folded
from flexperts.modeling.caches import read_prompts, response_losses
from flexperts.modeling.chunked_losses import scored_losses
from flexperts.modeling.forward import Precision, autocast

SCORES = ("rouge_l", "nll")
"""Names of the scores in files."""
REWARDS = ("reward_margin", "reward_accuracy")
"""Names of the further scores of preference rows."""


def kinds_in(names: Container[str]) -> tuple[str, ...]:
    """Return the names of scores that a client or row has; those of ``SCORES`` always."""
    return (*SCORES, *(kind for kind in REWARDS if kind in names))


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the scoring.

    Args:
        max_new_tokens: Longest generated answer, in tokens.
        batch_size: Rows per forward pass and per generated batch.
        precision: As in training.
        answers: Whether answers are generated and scored by ROUGE-L.
        pairs: Whether the rows' rejected answers are scored too; each row then has one.
    """

    max_new_tokens: int
    batch_size: int
    precision: Precision
    answers: bool = True
    pairs: bool = False


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
        rejected: Summed NLL of every row's rejected answer, in nats; empty where the rows are no preferences.
        margins: Reward margin of every row, in nats; empty as ``rejected``, and before ``rewarded``.
    """

    nlls: tuple[float, ...]
    tokens: tuple[int, ...]
    points: tuple[float, ...] = ()
    predictions: tuple[Answer, ...] = ()
    rejected: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()

    def rewarded(self, base: Scores, beta: float) -> Scores:
        """Return these scores with the rows' reward margins.

        Args:
            base: The untouched base's scores on the same rows.
            beta: Factor of the log-ratios.
        """
        ours, theirs = (
            [its.nlls[i] * its.tokens[i] - its.rejected[i] for i in range(its.rows)] for its in (self, base)
        )
        return replace(self, margins=tuple(beta * (b - a) for a, b in zip(ours, theirs, strict=True)))

    @property
    def losses(self) -> tuple[float, ...]:
        """Each row's loss in the run's objective: DPO's where there are margins, else the NLL per token."""
        return tuple(np.logaddexp(0.0, -np.array(self.margins)).tolist()) if self.margins else self.nlls

    @property
    def weights(self) -> tuple[int, ...]:
        """Weight of each row in the mean of ``losses``: one where there are margins, else its tokens."""
        return (1,) * self.rows if self.margins else self.tokens

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

    @property
    def loss(self) -> float | None:
        """Mean of ``losses``; None if a row's loss is not finite."""
        return mean_of(self.losses) if self.margins else self.nll

    @property
    def reward_margin(self) -> float | None:
        """Mean reward margin, in nats; None without preferences, or if a row's margin is not finite."""
        return mean_of(self.margins)

    @property
    def reward_accuracy(self) -> float | None:
        """Percentage of rows with a margin above 0, an equal pair counting half; None as ``reward_margin``."""
        return mean_of(map(_won, self.margins))

    def metrics(self) -> dict[str, float | None]:
        """Return the means by name; None where a mean is not finite."""
        points = {"rouge_l": self.rouge_l} if self.points else {}
        rewards = {kind: getattr(self, kind) for kind in REWARDS} if self.margins else {}
        return {**points, "nll": self.nll, **rewards}

    def row(self, index: int) -> dict[str, float | None]:
        """Return one row's numbers by name; None where a number is not finite."""
        points = {"rouge_l": finite_or_none(self.points[index])} if self.points else {}
        pair = self.margins[index : index + 1]
        rewards = {kind: finite_or_none(v) for m in pair for kind, v in zip(REWARDS, (m, _won(m)), strict=True)}
        return {**points, "nll": finite_or_none(self.nlls[index]), "tokens": self.tokens[index], **rewards}


def _won(margin: float) -> float:
    """Return the points of a pair: 100 if the chosen answer has the higher reward, 50 if both are equal."""
    return math.nan if math.isnan(margin) else 50.0 * ((margin > 0) + (margin >= 0))


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
    rejected = [0.0] * len(rows) if settings.pairs else []
    for chosen in longest_first([e.prompt for e in examples], settings.batch_size):
        found = _batch(model, encoder, [examples[i] for i in chosen], settings, on_batch)
        for index, total, count, text in zip(chosen, found.sums, found.counts, found.answers, strict=True):
            nlls[index], tokens[index], predictions[index] = total / count, count, text
        for index, total in zip(chosen, found.rejected, strict=False):
            rejected[index] = total
        on_rows(len(chosen))
    if not settings.answers:
        return Scores(tuple(nlls), tuple(tokens), rejected=tuple(rejected))
    points = rouge_l(predictions, [_reference(encoder, row, e) for row, e in zip(rows, examples, strict=True)])
    whole = [given.finite and math.isfinite(nll) for given, nll in zip(predictions, nlls, strict=True)]
    points = [value if is_whole else math.nan for value, is_whole in zip(points, whole, strict=True)]
    return Scores(tuple(nlls), tuple(tokens), tuple(points), tuple(predictions), tuple(rejected))


class _Found(NamedTuple):
    """Of a batch's rows: summed NLL in nats, number of trained tokens, answers, summed NLL of rejected answers."""

    sums: list[float]
    counts: list[int]
    answers: list[Answer]
    rejected: list[float]


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
) -> _Found:
    prompts, pad = prompt_batch([e.prompt for e in examples], encoder), encoder.tokenizer.pad_token_id
    if on_batch:
        on_batch(prompts)
    with autocast(next(model.parameters()).device, settings.precision):
        read = read_prompts(model, prompts)
        sides = list(zip(*(e.forms[: 1 + settings.pairs] for e in examples), strict=True))
        same = all(form.prompt == e.prompt for e in examples for form in e.forms)  # a template may see the answer
        if read.can_go_on and same and not any(e.earlier for e in examples):
            losses = [response_losses(model, read, pad_responses(side, pad)) for side in sides]
        else:
            losses = [scored_losses(model, pad_batch(side, pad)) for side in sides]
        answers = [Answer("")] * len(examples)
        if settings.answers:
            limit = settings.max_new_tokens
            answers = greedy_answers(model, encoder, read, limit, rows_leave=on_batch is None)
    sums, counts = zip(*losses, strict=True)
    first, *others = torch.stack(sums).double().tolist()  # a card is waited for once
    return _Found(first, counts[0].tolist(), answers, others[0] if others else [])


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
