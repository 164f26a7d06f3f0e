"""ROUGE-L as rouge-score computes it, over words of any script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from flexperts.evaluation.words import UnicodeWords, folded


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=UnicodeWords())


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return each prediction's ROUGE-L F1 against its reference, in points from 0 to 100.

    A reference without any word, such as ``+`` or an emoji, is right when it is repeated: 100, and else 0.
    """
    return [_points(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]


def _points(prediction: str, reference: str) -> float:
    if not UnicodeWords().tokenize(reference):
        return 100.0 * (bool(reference.strip()) and _signs(prediction) == _signs(reference))
    return float(100.0 * _scorer().score(reference, prediction)["rougeL"].fmeasure)


def _signs(text: str) -> str:
    return "".join(folded(text).split())
