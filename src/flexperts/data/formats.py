"""The formats of files of rows, recognised by their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexperts.config.data import DataFormat
from flexperts.data.columns import CHATS, CHOSEN, KNOWN, REQUIRED, fields_of, looks_like_instructions
from flexperts.data.records import names_shown
from flexperts.errors import DataError

_TURNS = {"messages": ("messages", "chat", "conversation"), "sharegpt": ("conversations", "conversation")}
"""Format of chats -> usual names of its column."""
_OWN = {
    "alpaca": {"instruction": "instruction", "context": "input", "response": "output"},
    "dolly": {"instruction": "instruction", "context": "context", "response": "response"},
    "prompt_completion": {"instruction": "prompt", "response": "completion"},
    "preference": {"instruction": "prompt", "context": "context", "response": "chosen", "rejected": "rejected"},
}
"""Format of instructions and responses -> field -> its column."""
_NEEDED = {"preference": ("response", "rejected")}
"""Format -> the fields of ``_OWN`` that it needs, if these are not instruction and response."""
_BESIDE = ("category", "tools", "system")
"""Fields of a chat besides its turns; each is read from a column of its own name."""


class Layout(NamedTuple):
    """How a source's rows are read.

    Args:
        format: instruction, alpaca, dolly, prompt_completion, preference, messages, sharegpt or text.
        fields: Field -> column; chats have the field ``messages``, plain text has ``text``.
    """

    format: DataFormat
    fields: dict[str, str]

    @property
    def told(self) -> str:
        """What is worth saying about the format; empty for instructions and responses."""
        if self.format == "text":
            return f"rows are plain text in {self.fields['text']!r}, and all of it is trained"
        if "rejected" in self.fields:
            return f"rows are preferences of {self.fields['response']!r} to {self.fields['rejected']!r}"
        return f"rows are chats in {self.fields['messages']!r}" if "messages" in self.fields else ""


def layout_of(source: str, columns: Sequence[str], mapped: Mapping[str, str], given: DataFormat = "auto") -> Layout:
    """Return a source's format and the column of each field.

    Args:
        source: The source, for messages.
        columns: The source's columns.
        mapped: Field -> column in the recipe; an empty name leaves an optional field empty.
        given: The recipe's format; auto recognises it.

    Raises:
        DataError: A column is missing, or two may be meant.
    """
    chosen = _recognised(columns, mapped) if given == "auto" else given
    if chosen == "text":
        return Layout(chosen, _beside(source, columns, mapped, {"text": mapped.get("text", "text")}, given))
    if chosen in _TURNS:
        usual = next((name for name in _TURNS[chosen] if name in columns), _TURNS[chosen][0])
        return Layout(chosen, _beside(source, columns, mapped, {"messages": mapped.get("messages", usual)}, given))
    own = _OWN.get(given, {})
    preset = {f: c for f, c in own.items() if c in columns or f in _NEEDED.get(given, REQUIRED)}
    empty = {"context": ""} if own and "context" not in preset else {}
    fields = fields_of(source, columns, {**empty, **preset, **mapped})
    found = _named(fields) if given == "auto" else given
    tools = mapped.get("tools", "tools")
    may_call = found in ("prompt_completion", "preference") and tools in columns
    return Layout(found, fields | ({"tools": tools} if may_call else {}))


def _recognised(columns: Sequence[str], mapped: Mapping[str, str]) -> DataFormat:
    for field, format_ in (("messages", "messages"), ("text", "text")):
        if mapped.get(field):
            return format_  # type: ignore[return-value]
    pairs = bool(mapped.get("rejected")) or {CHOSEN, "rejected"} <= {*columns}
    if {*REQUIRED} & mapped.keys() or pairs or _has_instructions(columns):
        return "instruction"
    if chats := [name for name in CHATS if name in columns]:
        return "sharegpt" if chats[0] == "conversations" else "messages"
    return "text" if "text" in columns and not looks_like_instructions(columns) else "instruction"


def _has_instructions(columns: Sequence[str]) -> bool:
    return all({*KNOWN[field]} & {*columns} for field in REQUIRED)


def _named(fields: Mapping[str, str]) -> DataFormat:
    """Return the name of the format that has these columns."""
    if "rejected" in fields:
        return "preference"
    used = {field: column for field, column in fields.items() if field != "category"}
    for name, own in _OWN.items():
        if used.items() <= own.items() and (name != "alpaca" or "response" in used):
            return name  # type: ignore[return-value]
    return "instruction"


def _beside(
    source: str, columns: Sequence[str], mapped: Mapping[str, str], found: dict[str, str], given: DataFormat
) -> dict[str, str]:
    """Return a chat's or a text's fields with those beside it."""
    for field in _BESIDE:
        column = mapped.get(field, field)
        if column and (column in columns or field in mapped):
            found[field] = column
    if missing := {field: column for field, column in found.items() if column not in columns}:
        field = next(iter(missing))
        raise DataError(
            f"{source}: no column {' and no '.join(map(repr, missing.values()))} among [{names_shown(columns)}]",
            "the recipe reads it" if field in mapped else f"data.format = {given!r} needs it",
            f"name the column under [data.columns], such as {field} = 'NAME', or change data.format",
        )
    return found
