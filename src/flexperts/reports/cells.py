"""Tables as values, and numbers as text: every number in a report is formatted here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MISSING = "–"
"""Shown where there is no number."""
MINUS = "−"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: The text that is shown.
        value: The number, in the unit of ``comparison.json``; None for words and for missing numbers.
        best: Whether the cell is the best of its column.
    """

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column's header.

    Args:
        name: What is measured, with its unit.
        group: The state and the rows; adjacent columns of the same group share a heading.
        words: Whether the cells are words, which are aligned left.
    """

    name: str
    group: str = ""
    words: bool = False

    @property
    def text(self) -> str:
        """The whole header on one line."""
        return f"{self.name} ({self.group})" if self.group else self.name


@dataclass(frozen=True)
class Table:
    """One table; the first cell of a row names it.

    Args:
        key: Name for links and ids.
        title: Heading.
        note: Explanation of the numbers and intervals, shown under the table.
        header: One column per cell of a row.
        rows: The cells; every row is as long as the header.
    """

    key: str
    title: str
    note: str
    header: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def without_empty_columns(self) -> Table:
        """Return the table without columns of numbers in which every number is missing."""
        kept = [i for i, c in enumerate(self.header) if c.words or any(row[i].text != MISSING for row in self.rows)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, header=tuple(self.header[i] for i in kept), rows=rows)


def words(text: object) -> Cell:
    """Return a cell of words."""
    return Cell(str(text))


def finite(value: Any) -> float | None:
    """Return a number as a float; None where it is missing, infinite or not a number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def number(value: Any, digits: int) -> Cell:
    """Return a number with ``digits`` digits after the point and a thousands comma."""
    value = finite(value)
    return Cell(MISSING) if value is None else Cell(_fixed(value, digits), value)


def significant(value: Any) -> Cell:
    """Return a number with two significant digits, such as 4.2e-07."""
    value = finite(value)
    return Cell(MISSING) if value is None else Cell(f"{value:.2g}".replace("-", MINUS), value)


def spread(stat: Mapping[str, Any] | None, digits: int, *, sign: bool = False) -> Cell:
    """Return ``mean ± std`` of a statistic; only the mean if there is no std (one seed)."""
    mean, std = (finite(stat.get(key)) for key in ("mean", "std")) if stat else (None, None)
    if mean is None:
        return Cell(MISSING)
    text = _signed(mean, digits) if sign else _fixed(mean, digits)
    return Cell(text if std is None else f"{text} ± {_fixed(std, digits)}", mean)


def interval(test: Mapping[str, Any] | None, digits: int) -> Cell:
    """Return ``difference [low, high]`` of a paired test."""
    found = [finite(test.get(key)) for key in ("difference", "low", "high")] if test else [None]
    if any(value is None for value in found):
        return Cell(MISSING)
    middle, low, high = (_signed(value, digits) for value in found if value is not None)
    return Cell(f"{middle} [{low}, {high}]", found[0])


def bounded(found: Mapping[str, Any] | None, digits: int) -> Cell:
    """Return ``value [low, high]``; only the value if there is no interval (one seed)."""
    value, low, high = (finite(found.get(key)) for key in ("value", "low", "high")) if found else (None, None, None)
    if value is None:
        return Cell(MISSING)
    ends = "" if low is None or high is None else f" [{_fixed(low, digits)}, {_fixed(high, digits)}]"
    return Cell(f"{_fixed(value, digits)}{ends}", value)


def p_value(value: Any) -> Cell:
    """Return a p-value with three digits, or ``< 0.001``."""
    value = finite(value)
    if value is None:
        return Cell(MISSING)
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}", value)


def size(value: Any) -> Cell:
    """Return bytes as B, kB, MB or GB (powers of 1,000)."""
    found = value = finite(value)
    if value is None or found is None:
        return Cell(MISSING)
    units = ("B", "kB", "MB", "GB")
    power = next((i for i in range(3) if round(value / 1000**i, min(i, 1)) < 1000), 3)
    digits = 0 if power == 0 else 2 if power == 3 else 1
    return Cell(f"{found / 1000**power:,.{digits}f} {units[power]}", found)


def percent(value: Any, *, sign: bool = False) -> Cell:
    """Return a share from 0 to 1 in percent, with one digit."""
    value = finite(value)
    if value is None:
        return Cell(MISSING)
    return Cell(_signed(100 * value, 1) if sign else _fixed(100 * value, 1), value)


def mark_best(
    rows: Sequence[tuple[Cell, ...]], column: int, *, lowest: bool = False, left_out: Collection[int] = ()
) -> list[tuple[Cell, ...]]:
    """Return rows with the best cells of a column marked, if at least two rows have a number.

    Args:
        rows: The rows.
        column: The place of the column.
        lowest: Whether less is better.
        left_out: Places of rows whose numbers cannot be compared with the others'.
    """
    values = [None if place in left_out else row[column].value for place, row in enumerate(rows)]
    present = [v for v in values if v is not None]
    if len(present) < 2:
        return list(rows)
    best = min(present) if lowest else max(present)
    return [
        (*row[:column], replace(row[column], best=value is not None and value == best), *row[column + 1 :])
        for row, value in zip(rows, values, strict=True)
    ]


def _fixed(value: float, digits: int) -> str:
    text = f"{abs(value):,.{digits}f}"
    return f"{MINUS}{text}" if value < 0 and float(text.replace(",", "")) else text


def _signed(value: float, digits: int) -> str:
    text = _fixed(value, digits)
    return f"+{text}" if value > 0 and float(text.replace(",", "")) else text
