"""How a source's rows are written: its format, and the column of each field of a row.

The recipe decides, else known names of columns; values are read in ``rows.py`` and ``turns.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexperts.config.data import DataFormat
from flexperts.data.records import Say, names_shown
from flexperts.errors import DataError, closest

REQUIRED = ("instruction", "response")
_CHOSEN = "chosen"
"""Column of the preferred answer, beside a rejected one."""
_KNOWN = {
    "instruction": ("instruction", "prompt"),
    "context": ("context", "input"),
    "response": ("response", "output", "completion", _CHOSEN),
    "category": ("category",),
    "rejected": ("rejected",),
}
"""Field -> its column in Dolly and in our files, in Alpaca, in files of prompts and completions, of preferences."""
PASSAGE = "passage"
_CHATS = ("messages", "conversations", "conversation", "chat")
"""Usual columns of chats; the first one that a source has decides its format."""
_MEANT = {
    "instruction": ("question", "query", "prompt", "input", "user", "task", "q"),
    "response": ("answer", "output", "completion", "reply", "assistant", "a"),
    "context": ("passage", "document", "text", "note", "background", "input"),
    "category": ("task", "type", "label", "class"),
    "rejected": ("rejected_response", "dispreferred", "worse", "loser"),
}
"""Other common names of the fields: suggested in messages, never used unless the recipe says so."""
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
"""Fields of a chat besides its turns, and their columns."""


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


def possible_columns(mapped: Mapping[str, str]) -> set[str]:
    """Return every column that may be read."""
    known = (name for names in _KNOWN.values() for name in names)
    return {PASSAGE, "text", *_CHATS, *_BESIDE, *known, *mapped.values()}


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
    fields = _fields(source, columns, {**empty, **preset, **mapped})
    found = _named(fields) if given == "auto" else given
    tools = mapped.get("tools", "tools")
    may_call = found in ("prompt_completion", "preference") and tools in columns
    return Layout(found, fields | ({"tools": tools} if may_call else {}))


def _recognised(columns: Sequence[str], mapped: Mapping[str, str]) -> DataFormat:
    if mapped.get("messages"):
        return "messages"
    if mapped.get("text"):
        return "text"
    pairs = bool(mapped.get("rejected")) or {_CHOSEN, "rejected"} <= {*columns}
    if {*REQUIRED} & mapped.keys() or pairs or all({*_KNOWN[field]} & {*columns} for field in REQUIRED):
        return "instruction"
    if chats := [name for name in _CHATS if name in columns]:
        return "sharegpt" if chats[0] == "conversations" else "messages"
    return "text" if "text" in columns and not _looks_like_instructions(columns) else "instruction"


def _looks_like_instructions(columns: Sequence[str]) -> bool:
    """Return whether a column has one of the usual names of an instruction or a response."""
    usual = {name for field in REQUIRED for name in (*_KNOWN[field], *_MEANT[field])}
    return any(name.casefold() in usual for name in columns)


def _named(fields: Mapping[str, str]) -> DataFormat:
    """Return the name of the format that has these columns."""
    if "rejected" in fields:
        return "preference"
    used = {field: column for field, column in fields.items() if field != "category"}
    for name, own in _OWN.items():
        if used.items() <= own.items():
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


def _fields(source: str, columns: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each field: as the recipe maps it, else by known names; see ``layout_of``."""
    found = {field: column for field, column in mapped.items() if column}
    for field in _KNOWN:
        free = [name for name in _KNOWN[field] if name in columns and name not in found.values()]
        if field in mapped or not free:
            continue
        if len(free) > 1 and free[0] != field:
            raise DataError(
                f"{source}: columns {names_shown(free)}",
                f"each of them may be the {field}",
                f"name one under [data.columns], such as {field} = {free[0]!r}",
            )
        found[field] = free[0]
    if "rejected" not in mapped and found.get("response") != _CHOSEN:
        found.pop("rejected", None)  # beside a response, such a column means something else
    required = ("response",) if "rejected" in found else REQUIRED  # a pair's chats may hold the question
    wanted = {field: field for field in required} | found
    if missing := {
        field: column for field, column in wanted.items() if column not in columns or field not in found
    }:
        raise _missing(source, missing, columns, mapped)
    return found


def _missing(
    source: str, missing: Mapping[str, str], columns: Sequence[str], mapped: Mapping[str, str]
) -> DataError:
    rules = [
        f"the {field} is required" if field in REQUIRED else f"the recipe reads the {field} from it"
        for field in missing
    ]
    hints = [f"{f} = {hint!r}" for f, c in missing.items() if (hint := _hint(f, c, columns, mapped))]
    return DataError(
        f"{source}: no column {' and no '.join(map(repr, missing.values()))} among [{names_shown(columns)}]",
        ", ".join(rules),
        f"name the column under [data.columns]{', such as ' if hints else ''}{', '.join(hints)}, or add it",
    )


def _hint(field: str, column: str, columns: Sequence[str], mapped: Mapping[str, str]) -> str | None:
    """Return the column that is most likely meant, if any: a similar name, or another common name of the field.

    A column of another field is never suggested: with response = 'instruction' a model would learn to repeat
    questions.
    """
    others = {name for other, names in _KNOWN.items() if other != field for name in (*names, mapped.get(other))}
    free = {name.casefold(): name for name in columns if name not in others - {*_MEANT[field]}}
    near = closest(column.casefold(), free, cutoff=0.75)
    return next((free[word] for word in (near, *_MEANT[field]) if word in free), None)


def say_columns(
    source: str, columns: Sequence[str], mapped: Mapping[str, str], layout: Layout, *others: str, say: Say
) -> None:
    """Report, in one line, the format, fields in a column of another name, and columns that are not used.

    Args:
        source, columns, mapped: As for ``layout_of``.
        layout: What ``layout_of`` returned.
        others: Columns that are used for something else.
        say: Called with the line, if there is one.
    """
    found = layout.fields
    taken = [f"{f} is read from {c!r}" for f, c in found.items() if f in _KNOWN and f not in mapped and c != f]
    unused = [name for name in columns if name not in {PASSAGE, *found.values(), *others}]
    parts = [layout.told, ", ".join(taken), f"unused columns: {names_shown(unused)}" if unused else ""]
    if line := "; ".join(part for part in parts if part):
        say(f"{source}: {line}")
