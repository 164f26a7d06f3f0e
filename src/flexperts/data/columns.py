"""The mapping from a source's columns to the fields of a row: by the recipe, else by known column names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexperts.data.records import Say, names_shown
from flexperts.errors import DataError, closest

FIELDS = ("instruction", "context", "response", "category", "rejected")
REQUIRED = ("instruction", "response")
CHOSEN = "chosen"
"""Column of the preferred answer, beside a rejected one."""
KNOWN = {
    "instruction": ("instruction", "prompt"),
    "context": ("context", "input"),
    "response": ("response", "output", "completion", CHOSEN),
    "category": ("category",),
    "rejected": ("rejected",),
}
"""Field -> its column in Dolly and in our files, in Alpaca, in files of prompts and completions, of preferences."""
PASSAGE = "passage"
CHATS = ("messages", "conversations", "conversation", "chat")
"""Columns with chats, the first one first."""
_BESIDE = ("text", "tools", "system")
_MEANT = {
    "instruction": ("question", "query", "prompt", "input", "user", "task", "q"),
    "response": ("answer", "output", "completion", "reply", "assistant", "a"),
    "context": ("passage", "document", "text", "note", "background", "input"),
    "category": ("task", "type", "label", "class"),
    "rejected": ("rejected_response", "dispreferred", "worse", "loser"),
}
"""Other common names of the fields: suggested in messages, never used unless the recipe says so."""


def possible_columns(mapped: Mapping[str, str]) -> set[str]:
    """Return every column that may be read."""
    return {PASSAGE, *CHATS, *_BESIDE, *mapped.values(), *(name for names in KNOWN.values() for name in names)}


def looks_like_instructions(columns: Sequence[str]) -> bool:
    """Return whether a column has one of the usual names of an instruction or a response."""
    usual = {name for field in REQUIRED for name in (*KNOWN[field], *_MEANT[field])}
    return any(name.casefold() in usual for name in columns)


def fields_of(source: str, columns: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each field: as the recipe maps it, else by known names.

    Args:
        source: The source, for messages.
        columns: The source's columns.
        mapped: Field -> column in the recipe; an empty name leaves an optional field empty.
    """
    found = {field: column for field, column in mapped.items() if column}
    for field in FIELDS:
        free = [name for name in KNOWN[field] if name in columns and name not in found.values()]
        if field in mapped or not free:
            continue
        if len(free) > 1 and free[0] != field:
            raise DataError(
                f"{source}: columns {names_shown(free)}",
                f"each of them may be the {field}",
                f"name one under [data.columns], such as {field} = {free[0]!r}",
            )
        found[field] = free[0]
    if "rejected" not in mapped and found.get("response") != CHOSEN:
        found.pop("rejected", None)  # beside a response, such a column means something else
    required = ("response",) if "rejected" in found else REQUIRED  # a pair's chats may hold the question
    wanted = {field: field for field in required} | found
    if missing := {
        field: column for field, column in wanted.items() if column not in columns or field not in found
    }:
        raise _missing(source, missing, columns, mapped)
    return found


def say_columns(
    source: str,
    columns: Sequence[str],
    mapped: Mapping[str, str],
    found: Mapping[str, str],
    *others: str,
    told: str = "",
    say: Say,
) -> None:
    """Report, in one line, fields that are read from a column of another name, and columns that are not used.

    Args:
        source, columns, mapped: As for ``fields_of``.
        found: What ``fields_of`` returned.
        others: Columns that are used for something else.
        told: What to say first.
        say: Called with the line, if there is one.
    """
    taken = [f"{f} is read from {c!r}" for f, c in found.items() if f in FIELDS and f not in mapped and c != f]
    unused = [name for name in columns if name not in {PASSAGE, *found.values(), *others}]
    parts = [told, ", ".join(taken), f"unused columns: {names_shown(unused)}" if unused else ""]
    if line := "; ".join(part for part in parts if part):
        say(f"{source}: {line}")


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
    others = {name for other, names in KNOWN.items() if other != field for name in (*names, mapped.get(other))}
    free = {name.casefold(): name for name in columns if name not in others - {*_MEANT[field]}}
    near = closest(column.casefold(), free, cutoff=0.75)
    return next((free[word] for word in (near, *_MEANT[field]) if word in free), None)
