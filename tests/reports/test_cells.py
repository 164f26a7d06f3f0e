"""Numbers as text: what is printed reads back as the number, to the printed digits."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.reports.cells import (
    MINUS,
    MISSING,
    Cell,
    Column,
    Table,
    interval,
    mark_best,
    number,
    p_value,
    percent,
    size,
    spread,
    words,
)


def signed(value: Any, digits: int) -> Cell:
    return spread({"mean": value}, digits, sign=True)


def plain(cell: Cell) -> str:
    """Return a number's text as Python reads it: no commas, ASCII minus."""
    return cell.text.replace(MINUS, "-").replace(",", "")


NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


@given(NUMBERS, st.integers(0, 4))
def test_a_number_reads_back_to_the_printed_digits(value: float, digits: int) -> None:
    for cell in (number(value, digits), signed(value, digits)):
        assert float(plain(cell)) == pytest.approx(value, abs=0.5001 * 10**-digits, rel=1e-12)
        assert cell.value == value
        assert cell.text.rstrip("0").rstrip(".") != "−0"


@given(NUMBERS, st.integers(0, 4))
def test_a_difference_shows_its_sign_unless_it_rounds_to_zero(value: float, digits: int) -> None:
    text = signed(value, digits).text
    rounded = round(value, digits)
    assert text[0] in "+−" if rounded else text[0] == "0"
    assert (text[0] == "+") == (rounded > 0)


@given(NUMBERS, st.floats(0, 1e6), st.integers(0, 4))
def test_mean_and_std_read_back(mean: float, std: float, digits: int) -> None:
    cell = spread({"mean": mean, "std": std}, digits)
    parts = [float(part) for part in plain(cell).split(" ± ")]
    assert parts == pytest.approx([mean, std], abs=0.5001 * 10**-digits, rel=1e-12)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_an_interval_reads_back(difference: float, low: float, high: float) -> None:
    text = plain(interval({"difference": difference, "low": low, "high": high}, 3))
    parts = [float(part) for part in text.replace("[", "").replace("]", "").replace(" ", " ").split()]
    assert parts == pytest.approx([difference, low, high], abs=0.0005001, rel=1e-12)


@given(st.floats(0, 1e13))
def test_a_size_reads_back_and_never_shows_a_thousand_of_a_unit_that_has_a_greater_one(value: float) -> None:
    shown, unit = plain(size(value)).split()
    half = {"B": 0.5, "kB": 50, "MB": 5e4, "GB": 5e6}[unit]
    assert float(shown) * UNITS[unit] == pytest.approx(value, abs=1.0001 * half, rel=1e-12)
    assert float(shown) < 1000 or unit == "GB"


@given(st.floats(0, 1))
def test_a_p_value_is_never_shown_as_zero(value: float) -> None:
    text = p_value(value).text
    if value < 0.001:
        assert text == "< 0.001"
    else:
        assert 0 < float(text) == pytest.approx(value, abs=0.00050001)


def test_examples_by_hand() -> None:
    assert number(1769472, 0).text == "1,769,472"
    assert signed(-0.04, 1).text == "0.0"
    assert signed(-0.06, 1).text == "−0.1"
    assert [size(v).text for v in (0, 999, 999.6, 1000, 2_580_000, 999_960, 1.834e9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.0 kB",
        "2.6 MB",
        "1.0 MB",
        "1.83 GB",
    ]
    assert (percent(0.2735).text, percent(-0.012, sign=True).text) == ("27.4", "−1.2")
    assert spread({"mean": 33.62, "std": None}, 1).text == "33.6"


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, "three"])
def test_what_is_no_number_is_a_dash(nothing: object) -> None:
    cells = [number(nothing, 1), signed(nothing, 1), size(nothing), p_value(nothing), percent(nothing)]
    cells += [spread({"mean": nothing, "std": 1.0}, 1), spread(None, 1), interval(None, 1)]
    cells.append(interval({"difference": 1.0, "low": nothing, "high": 2.0}, 1))
    assert {(cell.text, cell.value) for cell in cells} == {(MISSING, None)}


def test_the_best_is_marked_only_where_two_can_be_compared() -> None:
    rows = [(words("a"), number(1, 0)), (words("b"), number(3, 0)), (words("c"), number(None, 0))]
    assert [row[1].best for row in mark_best(rows, 1)] == [False, True, False]
    assert [row[1].best for row in mark_best(rows, 1, lowest=True)] == [True, False, False]
    assert not any(row[1].best for row in mark_best([rows[0], rows[2]], 1))


def test_columns_without_a_number_are_left_out() -> None:
    header = (Column("entry", words=True), Column("x"), Column("y"))
    table = Table("k", "t", "", header, ((words("a"), Cell(MISSING), number(1, 0)),)).without_empty_columns()
    assert [column.name for column in table.header] == ["entry", "y"]
    assert [[cell.text for cell in row] for row in table.rows] == [["a", "1"]]
