"""What happens to rows that cannot be used: their source is refused with all of them, or they are left out."""

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
        where: Source and place, as ``Row.where``.
        what: What is wrong with it; none of its text.
        rule: The rule it breaks.
    """

    where: str
    what: str
    rule: str


def settle_bad_rows(
    source: str, bad: Sequence[BadRow], total: int, on_bad_row: OnBadRow | None, say: Say = unsaid
) -> None:
    """Return if there are no bad rows, or if they may be left out; then they are told in one line.

    Args:
        source: Where the rows are from: a file, or a client.
        bad: The bad rows, in their order.
        total: All rows of the source.
        on_bad_row: The setting; None where no row may be left out.
        say: Gets the line.

    Raises:
        DataError: Rows are bad and may not be left out, or none would stay.
    """
    if not bad:
        return
    if on_bad_row == "drop" and len(bad) < total:
        say(f"{source}: {len(bad)} of {total} rows are left out (data.on_bad_row = 'drop'): {_listed(source, bad)}")
        return
    remedy = "correct them" if len(bad) > 1 else "correct it"
    if on_bad_row == "refuse" and len(bad) < total:
        remedy += ", or have such rows left out with data.on_bad_row = 'drop'"
    if len(bad) == 1:
        where = bad[0].where if bad[0].where.startswith(source) else f"{source}: {bad[0].where}"
        raise DataError(f"{where}: {bad[0].what}", bad[0].rule, remedy)
    raise DataError(f"{source}: {len(bad)} of {total} rows cannot be used", _listed(source, bad), remedy)


def _listed(source: str, bad: Sequence[BadRow]) -> str:
    return some([f"{row.where.removeprefix(f'{source}, ')}: {row.what}" for row in bad])


def some(told: Sequence[str]) -> str:
    """Return the first of many things in words, and how many more there are."""
    more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
    return "; ".join([*told[:_TOLD], *more])
