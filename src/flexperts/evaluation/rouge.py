"""ROUGE-L as rouge-score computes it, with its Porter stemmer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return each prediction's ROUGE-L F1 against its reference, in points from 0 to 100."""
    pairs = zip(predictions, references, strict=True)
    return [100.0 * _scorer().score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
