"""Handling of rows that cannot be used: the whole source is refused, or these rows are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flexperts.config.data import OnBadRow
from flexperts.data.records import Say, unsaid
from flexperts.errors import DataError

_TOLD = 10


class BadRow(NamedTuple):
    """A row that cannot be used.

    Args:
        where: Source and place, as in ``Row.where``.
        what: What is wrong with the row, without any of its text.
        rule: The rule that the row breaks.
    """

    where: str
    what: str
    rule: str


class BadValueError(Exception):
    """A value of a row that cannot be used; ``what`` and ``rule`` as of a ``BadRow``."""

    def __init__(self, what: str, rule: str) -> None:
        super().__init__(what)
        self.what, self.rule = what, rule


def settle_bad_rows(
    source: str, bad: Sequence[BadRow], total: int, on_bad_row: OnBadRow | None, say: Say = unsaid
) -> None:
    """Refuse bad rows, or report in one line that they are left out.

    Args:
        source: Where the rows are from: a file, or a client.
        bad: The bad rows, in the order of the source.
        total: Number of all rows of the source.
        on_bad_row: The setting ``data.on_bad_row``; None where no row may be left out.
        say: Called with the line.
    """
    if not bad:
        return
    if on_bad_row == "drop" and len(bad) < total:
        say(f"{source}: {len(bad)} of {total} rows are left out (data.on_bad_row = 'drop'): {_listed(source, bad)}")
        return
    remedy = "correct these rows in the source" if len(bad) > 1 else "correct this row in the source"
    if on_bad_row == "refuse" and len(bad) < total:
        remedy += ", or have such rows left out with data.on_bad_row = 'drop'"
    if len(bad) == 1:
        where = bad[0].where if bad[0].where.startswith(source) else f"{source}: {bad[0].where}"
        raise DataError(f"{where}: {bad[0].what}", bad[0].rule, remedy)
    raise DataError(f"{source}: {len(bad)} of {total} rows cannot be used", _listed(source, bad), remedy)


def _listed(source: str, bad: Sequence[BadRow]) -> str:
    return some([f"{row.where.removeprefix(f'{source}, ')}: {row.what}" for row in bad])


def some(told: Sequence[str]) -> str:
    """Return the first items of a list as text, and the number of the others."""
    more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
    return "; ".join([*told[:_TOLD], *more])
