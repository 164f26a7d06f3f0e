"""Preference rows: one question with a chosen and a rejected answer, as texts or as chats.

The forms are TRL's: ``prompt``, ``chosen`` and ``rejected`` as texts or as lists of messages, or two chats with the
question in the turns that they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexperts.data.bad_rows import BadValueError

_PAIR = ("instruction", "response", "rejected")
_Turn = tuple[str, Any]
"""Role and content of a message."""


def with_texts(values: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any]:
    """Return a preference row's values with texts in the place of chats; other values as they are.

    Args:
        values: Column -> value.
        fields: Field -> column; rejected is among them.

    Raises:
        BadValueError: The chats are not one conversation with two answers.
    """
    prompt, chosen, rejected = (values.get(fields[field]) for field in _PAIR)
    if not any(isinstance(value, list) for value in (prompt, chosen, rejected)):
        return values
    columns = [fields[field] for field in _PAIR]
    asked = _turns(prompt, columns[0], "user") if prompt else []
    first, second = (_turns(v, c, "assistant") for v, c in ((chosen, columns[1]), (rejected, columns[2])))
    if not isinstance(prompt, list) and first[0][0] != "assistant":
        asked = []  # the chats hold the prompt themselves
    *shared, answer = *asked, *first
    *other, worse = *asked, *second
    _check(shared, other, answer, worse)
    texts = (shared[-1][1], answer[1], worse[1])
    return {**values, **dict(zip(columns, texts, strict=True))}


def _turns(value: Any, column: str, role: str) -> list[_Turn]:
    """Return a column's messages; a text is one message of the given role."""
    if isinstance(value, str):
        return [(role, value)]
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise BadValueError(f"{column} is neither text nor a list of messages", "it must be text, or messages")
    return [(str(turn.get("role")), turn.get("content")) for turn in value]


def _check(shared: Sequence[_Turn], other: Sequence[_Turn], answer: _Turn, worse: _Turn) -> None:
    if shared != other or (answer[0], worse[0]) != ("assistant", "assistant"):
        raise BadValueError(
            "the two chats differ before their last turn, or do not end with the assistant",
            "chosen and rejected must be one conversation with two last answers",
        )
    if not shared or shared[-1][0] != "user":
        raise BadValueError("no turn of the user before the answers", "an answer must follow the user's turn")
    if len(shared) > 1:
        raise BadValueError(
            f"{len(shared) - 1} turns before the question", "a preference row is one question and its two answers"
        )
