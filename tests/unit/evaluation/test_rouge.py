"""ROUGE-L against values by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.evaluation.scores import rouge_l


@pytest.mark.parametrize(
    ("prediction", "reference", "points"),
    [
        ("the cat sat", "the cat on the mat", 50.0),  # LCS 2: P 2/3, R 2/5
        ("b a", "a b", 50.0),  # order counts
        ("a x b y c", "a b c", 75.0),  # gaps do not: P 3/5, R 1
        ("a b c", "a b c", 100.0),
        ("The CAT, sat!", "the cat sat", 100.0),  # neither case nor punctuation
        ("running dogs", "run dog", 100.0),  # Porter stems
        ("a b", "c d", 0.0),
        ("", "a b", 0.0),
        ("...", "a b", 0.0),
    ],
)
def test_by_hand(prediction: str, reference: str, points: float) -> None:
    assert rouge_l([prediction], [reference]) == [pytest.approx(points)]


def test_each_pair_is_scored_for_itself() -> None:
    assert rouge_l(["a b", "c d"], ["a b", "a b"]) == [100, 0]
    assert rouge_l([], []) == []
    with pytest.raises(ValueError, match="zip"):
        rouge_l(["a"], ["a", "b"])


WORDS = st.lists(st.sampled_from(["ox", "elk", "cod", "ant"]), min_size=1, max_size=9)


@given(WORDS, WORDS)
def test_against_a_table_of_common_subsequences(prediction: list[str], reference: list[str]) -> None:
    table = [[0] * (len(reference) + 1) for _ in range(len(prediction) + 1)]
    for i, left in enumerate(prediction):
        for j, right in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    f1 = 2 * table[-1][-1] / (len(prediction) + len(reference))
    assert rouge_l([" ".join(prediction)], [" ".join(reference)]) == [pytest.approx(100 * f1)]
