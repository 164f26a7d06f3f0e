"""The answer in sentences says what the numbers say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flexperts.reports.reading import ordered, verdict
from flexperts.reports.summary import facts, summary
from flexperts.reports.tables import tables

Comparison = dict[str, Any]


def put(
    comparison: Comparison, name: str, rouge: float, nll: float, test: tuple[float, float, float] | None
) -> None:
    entry = next(e for e in comparison["entries"] if e["name"] == name)
    own = entry["scores"][entry["own_state"]]["own"]
    own["rouge_l"] |= {"mean": rouge, "std": 1.0}
    own["nll"] |= {"mean": nll, "std": 0.01}
    if test is not None:
        found = dict(zip(("low", "difference", "high"), test, strict=True)) | {"p": 0.001, "p_adjusted": 0.002}
        entry["against"] = {"rouge_l": found, "nll": {**found, "difference": 0.5, "low": 0.1, "high": 0.9}}


@pytest.fixture
def ranked(whole: Comparison) -> Comparison:
    put(whole, "flex", 30.0, 1.0, None)
    put(whole, "fedavg", 20.0, 3.0, (-12.0, -10.0, -8.0))
    put(whole, "local", 34.0, 1.5, (1.0, 4.0, 7.0))
    return whole


def test_the_best_and_its_interval_come_first(ranked: Comparison) -> None:
    first, second, third = summary(ranked)
    assert first == (
        "local (personalized) has the best ROUGE-L on the clients' own test rows: 34.0 ± 1.0. Its difference to "
        "flex is +4.0 [+1.0, +7.0]; the 95 % interval excludes 0 (adjusted p = 0.002)."
    )
    assert second.startswith("flex (personalized), the reference, has the best NLL")
    assert (
        "1 is better and 1 worse, with an interval that excludes 0 and an adjusted p below 0.05; 0 are not" in third
    )


def test_an_interval_over_zero_is_said_to_decide_nothing(ranked: Comparison) -> None:
    put(ranked, "local", 34.0, 0.5, (-1.0, 4.0, 9.0))
    first, second, third = summary(ranked)
    assert "includes 0 (adjusted p = 0.002): not statistically significant" in first
    assert second == "It is also best by NLL (0.500 ± 0.010)."
    assert "0 are better and 1 worse" in third
    assert "1 is not significantly different" in third


@pytest.mark.parametrize(
    ("low", "high", "p", "metric", "expected"),
    [
        (1, 2, 0.01, "rouge_l", "better"),
        (-2, -1, 0.01, "rouge_l", "worse"),
        (1, 2, 0.01, "nll", "worse"),
        (-2, -1, 0.01, "nll", "better"),
        (-1, 1, 0.01, "nll", "open"),
        (0, 1, 0.01, "rouge_l", "open"),
        (1, 2, 0.06, "rouge_l", "open"),  # one of many intervals that would leave 0 out by chance
        (None, 1, 0.01, "rouge_l", "none"),
    ],
)
def test_lower_nll_is_better(
    whole: Comparison, low: float | None, high: float, p: float, metric: str, expected: str
) -> None:
    entry = whole["entries"][1]
    entry["against"] = {metric: {"difference": 0.5, "low": low, "high": high, "p": 0.01, "p_adjusted": p}}
    assert verdict(whole, entry, metric) == expected
    assert verdict(whole, whole["entries"][0], metric) == "none"


def test_what_adjustment_undoes_is_said(ranked: Comparison) -> None:
    ranked["entries"][2]["against"]["rouge_l"]["p_adjusted"] = 0.059
    first, _, third = summary(ranked)
    assert "the 95 % interval excludes 0 (adjusted p = 0.059): not significant after adjustment." in first
    assert "0 are better and 1 worse" in third


def test_a_single_run_is_set_against_its_base(single: Comparison) -> None:
    (sentence,) = summary(single)
    assert sentence.startswith("flex (personalized) has ROUGE-L ")
    assert "the untouched base has" in sentence
    assert facts(single) == [("entry", "1"), ("clients", "2"), ("seed", "1"), ("scored rows", "test")]


def test_without_scores_it_says_so(single: Comparison) -> None:
    single["entries"][0]["scores"] = {}
    assert summary(single) == ["No entry has a score yet."]


def test_without_answers_nll_decides(made: Callable[..., Comparison]) -> None:
    comparison = made(["flex", "fedavg"], ["clinic"], 2)
    for entry in comparison["entries"]:
        for state in entry["scores"].values():
            state["own"]["rouge_l"] = None
    first, *_ = summary(comparison)
    assert "best NLL" in first


def test_one_seed_is_said_to_be_one(whole: Comparison) -> None:
    caution = "All scores are from one seed; another seed may give another order."
    assert caution not in summary(whole)
    entries = {entry["name"]: entry for entry in whole["entries"]}
    entries["local"]["seeds"] = [0]
    assert summary(whole)[-1] == "The differences of local are from one seed; another seed may give another order."
    whole["seeds"] = [0]
    for entry in whole["entries"]:
        entry["seeds"] = [0]
    assert summary(whole)[-1] == caution


def test_an_entry_with_other_seeds_than_most_is_the_best_of_nothing(
    made: Callable[..., Comparison],
) -> None:
    """Its mean is over other runs: it comes last, and no mark and no sentence say that it is best."""
    comparison = made(["flex", "fedavg", "local"], ["clinic"], 2) | {"reference": "local"}
    best = ordered(comparison)[0]
    assert summary(comparison)[0].startswith(best["name"])
    best |= {"other_seeds": True, "seeds": [0]}
    assert ordered(comparison)[-1] is best
    assert not summary(comparison)[0].startswith(best["name"])
    main = tables(comparison)["main"]
    assert main.rows[2][0].text == best["name"]
    assert not any(cell.best for cell in main.rows[2])
    assert f"come last, and none is marked as best: {best['name']}." in main.note
