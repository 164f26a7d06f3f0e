"""The one-standard-error rule, against a computation by hand and by its properties."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.client.floor import choose
from flexperts.methods.kit.candidates import CANDIDATES, MIXTURES

ROWS = 4
NLL = st.floats(0.0, 8.0, allow_subnormal=False)


@st.composite
def scored(draw: st.DrawFn) -> dict[str, list[float]]:
    """NLL of every row for some candidates, the base always among them."""
    names = draw(st.sets(st.sampled_from(CANDIDATES[1:])))
    return {name: [draw(NLL) for _ in range(ROWS)] for name in ("zero_shot", *names)}


def weighted(nlls: list[float], tokens: list[int]) -> float:
    return sum(n * t for n, t in zip(nlls, tokens, strict=True)) / sum(tokens)


def error(own: list[float], best: list[float], tokens: list[int]) -> float:
    """The standard error of a weighted mean of paired differences, as a loop."""
    d = [a - b for a, b in zip(own, best, strict=True)]
    centre, total = weighted(d, tokens), sum(tokens)
    squares = sum((t / total) ** 2 * (each - centre) ** 2 for each, t in zip(d, tokens, strict=True))
    return math.sqrt(len(d) / (len(d) - 1) * squares)


def test_by_hand() -> None:
    """Differences to the best are 0.4, 0.0, 0.2, 0.2 of global and 0.3 on each row of the base."""
    best = [1.0, 2.0, 1.5, 1.5]
    close = [b + d for b, d in zip(best, (0.8, 0.0, 0.1, -0.1), strict=True)]  # mean 0.2, standard error 0.2041
    far = [b + 0.3 for b in best]
    assert mean((0.8, 0.0, 0.1, -0.1)) == pytest.approx(0.2)
    assert stdev((0.8, 0.0, 0.1, -0.1)) / 2 == pytest.approx(0.2041, abs=1e-4)
    even = [5] * 4
    assert choose({"zero_shot": far, "global": close, "personalized": best}, even) == "global"
    # Counted by tokens, the first row decides: the difference is 0.61, its error 0.19.
    assert choose({"zero_shot": far, "global": close, "personalized": best}, [60, 5, 10, 5]) == "personalized"
    assert choose({"zero_shot": far, "personalized": best}, even) == "personalized"


def test_with_equal_rows_it_is_the_textbooks_error() -> None:
    own, best = [1.0, 2.5, 0.5, 3.0], [1.0, 2.0, 0.0, 1.0]
    d = [a - b for a, b in zip(own, best, strict=True)]
    assert error(own, best, [7] * 4) == pytest.approx(stdev(d) / math.sqrt(4))


def test_simplicity_is_base_global_local_personalized_then_mixtures() -> None:
    same = {name: [1.0, 2.0] for name in reversed(CANDIDATES)}
    for expected in CANDIDATES:
        assert choose(same, [1, 1]) == expected
        del same[expected]
    assert ("zero_shot", "global", "local", "personalized", *MIXTURES) == CANDIDATES
    assert sorted(MIXTURES.values()) == list(MIXTURES.values()) == [0.25, 0.5, 0.75]


@given(scored(), st.lists(st.integers(1, 30), min_size=ROWS, max_size=ROWS))
def test_never_worse_than_the_best_by_more_than_one_error_and_nothing_simpler_would_do(
    nlls: dict[str, list[float]], tokens: list[int]
) -> None:
    chosen = choose(nlls, tokens)
    means = {name: weighted(each, tokens) for name, each in nlls.items()}
    best = min(means.values())
    nearly = {name for name, value in means.items() if value <= best + 1e-9}
    assert any(means[chosen] <= best + error(nlls[chosen], nlls[b], tokens) + 1e-9 for b in nearly)
    if len(nearly) == 1:
        [b] = nearly
        for simpler in CANDIDATES[: CANDIDATES.index(chosen)]:
            if simpler in nlls:
                assert means[simpler] > best + error(nlls[simpler], nlls[b], tokens) - 1e-9


@given(scored())
def test_the_order_of_candidates_and_equal_scores_decide_nothing(nlls: dict[str, list[float]]) -> None:
    tokens = [3, 5, 8, 2]
    assert choose(dict(reversed(nlls.items())), tokens) == choose(nlls, tokens)
    assert choose(nlls | {"mixture 0.75": nlls["zero_shot"]}, tokens) != "mixture 0.75"


@given(scored(), st.sampled_from([math.nan, math.inf]))
def test_a_candidate_without_finite_scores_is_never_kept(nlls: dict[str, list[float]], bad: float) -> None:
    worst = nlls | {"global": [0.0, 0.0, 0.0, bad]}
    assert choose(worst, [1, 2, 3, 4]) != "global"
    assert choose({name: [bad] * ROWS for name in nlls}, [1, 2, 3, 4]) == "zero_shot"
