"""Rows that are encoded when they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from flexperts.data.prompts import Example


class TrainRows(Sequence[Example]):
    """A client's train rows, encoded when the first one is looked at: a model that is only used needs none.

    Args:
        read: Returns them.
    """

    def __init__(self, read: Callable[[], Sequence[Example]]) -> None:
        self._read = read

    @cached_property
    def _rows(self) -> Sequence[Example]:
        return self._read()

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)
