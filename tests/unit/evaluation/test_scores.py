"""Scores of rows: what one row's numbers are, and how they come to one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import Answer, generate
from flexperts.evaluation.scores import EvaluationSettings, Scores, evaluate, mean_of, rouge_l
from flexperts.testing import byte_tokenizer, tiny_model

ROWS = [Row("What?", "no"), Row("Sum up", "a till and a shelf", "A long note. " * 4), Row("Why?", "because")]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(byte_tokenizer())


def settings(*, answers: bool, batch_size: int = 2) -> EvaluationSettings:
    return EvaluationSettings(4, batch_size, "fp32", answers)


@torch.no_grad()
def row_nll(model: Any, encoder: PromptEncoder, row: Row) -> tuple[float, int]:
    example = encoder.encode(row)
    prompt, response = list(example.prompt), list(example.input_ids[example.prompt_length :])
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return float(F.cross_entropy(logits.double(), torch.tensor(response))), len(response)


@pytest.mark.parametrize("batch_size", [1, 2, 20])
def test_every_rows_nll_is_its_own(model: Any, encoder: PromptEncoder, batch_size: int) -> None:
    scores = evaluate(model, encoder, ROWS, settings(answers=False, batch_size=batch_size))
    expected = [row_nll(model, encoder, row) for row in ROWS]
    assert scores.nlls == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    assert scores.tokens == tuple(tokens for _, tokens in expected)
    assert scores.tokens == (3, 19, 8)  # bytes and EOS


def test_nll_weights_rows_by_tokens_and_rouge_by_none() -> None:
    scores = Scores((1.0, 4.0), (3, 1), (10.0, 40.0), (Answer("a"), Answer("b")))
    assert scores.nll == 1.75
    assert scores.rouge_l == 25.0
    assert scores.rows == 2
    assert scores.metrics() == {"rouge_l": 25.0, "nll": 1.75}
    assert scores.row(1) == {"rouge_l": 40.0, "nll": 4.0, "tokens": 1}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_that_is_no_number_leaves_no_mean_of_the_others(broken: float) -> None:
    scores = Scores((1.0, broken), (3, 1), (10.0, math.nan), (Answer("a"), Answer("b")))
    assert scores.metrics() == {"rouge_l": None, "nll": None}
    assert scores.row(0) == {"rouge_l": 10.0, "nll": 1.0, "tokens": 3}
    assert scores.row(1) == {"rouge_l": None, "nll": None, "tokens": 1}
    assert Scores((broken,), (3,)).metrics() == {"nll": None}


def test_an_answer_without_finite_logits_has_no_points_though_the_loss_is_finite(
    model: Any, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ill(*_: Any, **__: Any) -> list[Answer]:
        return [Answer("x", 1, finite=False), Answer("no", 4, cut=True)]

    monkeypatch.setattr("flexperts.evaluation.scores.greedy_answers", ill)
    scores = evaluate(model, encoder, [ROWS[0], ROWS[2]], settings(answers=True))
    assert sorted(scores.points, key=math.isnan)[0] >= 0
    assert (scores.rouge_l, scores.cut) == (None, 1)
    assert math.isfinite(scores.nll or math.nan)


def test_a_mean_needs_all_its_values() -> None:
    assert mean_of([1.0, 2.0]) == 1.5
    assert mean_of([1.0, None]) is mean_of([1.0, math.inf]) is mean_of([]) is None


def test_without_answers_there_is_no_rouge_and_nothing_is_generated(
    model: Any, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(model, encoder, ROWS, settings(answers=True))
    monkeypatch.setattr("flexperts.evaluation.scores.greedy_answers", None)
    seen: list[int] = []
    scores = evaluate(model, encoder, ROWS, settings(answers=False), seen.append)
    assert (scores.nlls, scores.tokens) == (whole.nlls, whole.tokens)
    assert (scores.points, scores.predictions, scores.rouge_l) == ((), (), None)
    assert scores.metrics() == {"nll": scores.nll}
    assert scores.row(0) == {"nll": scores.nlls[0], "tokens": 3}
    assert sum(seen) == len(ROWS)


def test_with_answers_every_row_has_its_points(model: Any, encoder: PromptEncoder) -> None:
    seen: list[int] = []
    rows = [*ROWS, Row("Say", "x")]
    alone = evaluate(model, encoder, rows, settings(answers=True)).predictions
    # a response that is the answer: the one way to score with a random model
    rows = [Row(r.instruction, a or r.response, r.context) for r, a in zip(rows, alone, strict=True)]
    scores = evaluate(model, encoder, rows, settings(answers=True), seen.append)
    assert scores.predictions == alone
    assert scores.points == tuple(rouge_l(scores.predictions, [row.response for row in rows]))
    assert scores.rouge_l == pytest.approx(sum(scores.points) / 4)
    assert sum(seen) == 4


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v32", "gpt_oss"])
def test_rows_score_alike_whatever_cache_a_family_has(encoder: PromptEncoder, family: str) -> None:
    model = tiny_model(family)
    rows = [Row(f"Note {n}", response) for n, response in enumerate(("rain", "snow", "wind"))]  # no padding
    scores = evaluate(model, encoder, rows, settings(answers=True, batch_size=3))
    assert scores.nlls == pytest.approx([row_nll(model, encoder, row)[0] for row in rows], rel=1e-5)
    prompts = [encoder.prompt(row.instruction) for row in rows]
    alone = [generate(model, encoder, [p], max_new_tokens=4, batch_size=1, precision="fp32")[0] for p in prompts]
    assert list(scores.predictions) == alone
