"""The schema of instruction data, and how tables with any column names are read into it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flexperts.config.data import DataFormat, OnBadRow
from flexperts.config.names import one_label
from flexperts.data.bad_rows import BadRow, BadValueError, settle_bad_rows, text_of
from flexperts.data.formats import PASSAGE, REQUIRED, Layout, layout_of, say_columns
from flexperts.data.records import DataTable, Number, Record, Say, names_shown, unsaid, whole_number
from flexperts.data.turns import Message, as_turns, read_chat, read_pair, read_turns, untrained
from flexperts.errors import DataError

_TEXTS = ("instruction", "context", "response", "rejected")
"""Fields in which numbers are read as text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example: an instruction and its response, a chat, or plain text.

    Args:
        instruction: What is asked; of a chat, its last user turn; of plain text, about the first half.
        response: What the silo wants as the answer; of a chat, its last assistant turn; of plain text, the rest.
        context: The passage asked about; may be empty.
        category: Name of the task; may be empty.
        passage: Identity of the passage, by which train and test are separated.
        where: File, line and row that it came from, for messages; not part of the row's content.
        before: A chat's turns before the last user turn.
        between: A chat's turns between the last user turn and the response: tool calls and their results.
        kept: JSON object of what else a chat template may write: ``tools`` that may be called, and other fields of
            the last turns of ``user`` and ``assistant``, and of the ``rejected`` answer, such as ``tool_calls``;
            may be empty.
        plain: Whether instruction and response are one plain text that is continued, without a template.
        rejected: An answer that the silo likes less than the response; empty in rows that are not preferences.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    passage: str = ""
    where: str = dataclasses.field(default="", compare=False)
    before: tuple[Message, ...] = ()
    between: tuple[Message, ...] = ()
    kept: str = ""
    plain: bool = False
    rejected: str = ""

    @property
    def content(self) -> list[Any]:
        """The row as JSON, without its place; fields that single questions do not have are there only if set."""
        single = [self.instruction, self.response, self.context, self.category, self.passage]
        others = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[len(single) + 1 :]}
        others = {name: value for name, value in others.items() if value}
        return [*single, *([_as_json(others)] if others else [])]

    @property
    def texts(self) -> dict[str, Any]:
        """The row's texts by field, as a run writes them beside its answers."""
        before = {"before": [message.mapping for message in self.before]} if self.before else {}
        rejected = {"rejected": self.rejected} if self.rejected else {}
        return (
            {"instruction": self.instruction, "context": self.context, "response": self.response}
            | before
            | rejected
        )

    @property
    def extras(self) -> dict[str, Any]:
        """What ``kept`` says."""
        return dict(json.loads(self.kept)) if self.kept else {}

    @property
    def with_rejected(self) -> Row:
        """The row with the rejected answer in the place of the response."""
        kept = {**self.extras, "assistant": self.extras.get("rejected", {})}
        return dataclasses.replace(self, response=self.rejected, kept=json.dumps(kept))


@dataclass(frozen=True)
class ClientRows:
    """One client's rows: train for training, validation for choosing settings, test only for reported scores."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    validation: tuple[Row, ...] = ()


class Label(NamedTuple):
    """The column with each row's category or client.

    Args:
        column: The field category, or any column.
        rule: Why each row needs a label, for messages.
    """

    column: str
    rule: str


def _as_json(value: Any) -> Any:
    """Return a row's field as JSON: a turn becomes the list of its fields."""
    return json.loads(json.dumps(value, default=dataclasses.astuple))


def read_rows(
    table: DataTable,
    columns: Mapping[str, str],
    *,
    format: DataFormat = "auto",
    on_bad_row: OnBadRow = "refuse",
    passage: str | None = None,
    say: Say = unsaid,
) -> list[Row]:
    """Turn a table into rows.

    Args:
        table: The table.
        columns: Field -> column, for the fields whose column has another name; see ``formats.layout_of``.
        format: How the rows are written; auto recognises it by the columns.
        on_bad_row: Whether rows that cannot be used are left out.
        passage: Column that identifies the passage; where it is missing, the context (or instruction) is used.
        say: Called with one line per surprising finding.
    """
    how: dict[str, Any] = {"format": format, "on_bad_row": on_bad_row, "passage": passage}
    return read_labelled(table, columns, None, **how, say=say)[0]


def read_labelled(
    table: DataTable,
    columns: Mapping[str, str],
    label: Label | None,
    *,
    format: DataFormat = "auto",
    on_bad_row: OnBadRow = "refuse",
    passage: str | None = None,
    say: Say = unsaid,
) -> tuple[list[Row], list[str]]:
    """Turn a table into rows and their labels; see ``read_rows``. Without ``label`` the labels are empty."""
    layout = Layout("instruction", {name: name for name in REQUIRED})
    if table.columns:
        layout = layout_of(table.source, table.columns, columns, format)
    fields = layout.fields
    by = _label_column(table, fields, label) if label and table.columns else None
    identity = passage or PASSAGE
    used = {*fields.values(), identity, *([by] if by else [])}
    good: list[tuple[Row, str]] = []
    bad: list[BadRow] = []
    unanswered = 0
    numbers: Counter[str] = Counter()  # field -> how many rows have a number in it
    for record in table.records(used):
        where = f"{table.source}, {record.place}"
        try:
            row, left = _row(record, layout, identity, where)
            unanswered += bool(left)
            good.append((row, _label(record, by, label) if by and label else ""))
        except BadValueError as error:
            bad.append(BadRow(where, error.what, error.rule))
        else:
            numbers.update(f for f in _TEXTS if isinstance(record.values.get(fields.get(f, "")), Number))
    if not (good or bad):
        raise DataError(table.source, "a split needs at least one row", "add rows or leave the client out")
    settle_bad_rows(table.source, bad, len(good) + len(bad), on_bad_row, say)
    say_columns(table.source, table.columns, columns, layout, identity, by or "", say=say)
    if unanswered:
        say(f"{table.source}: {unanswered} chats end with turns that no answer follows; these turns are left out")
    rows = [row for row, _ in good]
    _say_texts(table.source, rows, numbers, say)
    return rows, [text for _, text in good]


def _say_texts(source: str, rows: Sequence[Row], numbers: Mapping[str, int], say: Say) -> None:
    """Report surprising findings in the rows' texts, in counts only."""
    if numbers:
        counts = ", ".join(f"{field} of {count} rows" for field, count in numbers.items())
        say(f"{source}: numbers are used as text, exactly as written ({counts})")
    if broken := sum("\ufffd" in "".join(_said(row)) for row in rows):
        say(f"{source}: {broken} rows contain U+FFFD, which replaces a character that a conversion lost")


def _said(row: Row) -> list[str]:
    turns = [message.content for message in (*row.before, *row.between)]
    return [row.instruction, row.context, row.response, row.rejected, *turns]


def _row(record: Record, layout: Layout, identity: str, where: str) -> tuple[Row, int]:
    """Return a record as a row, and the number of turns of a chat that are left out at its end."""
    if record.fault:
        raise BadValueError(*record.fault)
    fields, values = {"instruction": "prompt", **layout.fields}, record.values  # a pair's chats may hold the prompt

    def labels(passage: str) -> dict[str, str]:
        named = text_of(values.get(identity), identity)
        category = text_of(values.get(fields["category"]), fields["category"]) if "category" in fields else ""
        return {"category": category, "passage": named if named.strip() else passage, "where": where}

    if "text" in fields:
        text = _field(values, "text", fields["text"])
        return Row(*_halves(text), plain=True, **labels(text)), 0  # type: ignore[arg-type]
    turns, rejected = _turns(values, fields, layout.format)
    unanswered = 0
    if turns is not None:
        chat = read_chat(turns, values.get(fields.get("tools", "")), rejected)
        row, unanswered = Row(**chat.fields, **labels(chat.first)), chat.unanswered  # type: ignore[arg-type]
    else:
        texts = {field: _field(values, field, fields[field]) for field in _TEXTS if field in fields}
        row = Row(**texts, **labels(texts.get("context") or texts["instruction"]))  # type: ignore[arg-type]
    chosen, other = row.extras.get("assistant"), row.extras.get("rejected")
    if "rejected" in fields and (row.response, chosen) == (row.rejected, other):
        raise BadValueError(f"{fields['rejected']} is the same as {fields['response']}", "a pair has two answers")
    return row, unanswered


def _turns(
    values: Mapping[str, Any], fields: Mapping[str, str], format_: DataFormat
) -> tuple[list[Message] | None, Message | None]:
    """Return the turns of a chat and its rejected answer; no turns where a row is an instruction and a response."""
    if column := fields.get("messages"):
        if values.get(column) is None:
            raise BadValueError(f"no {column}", "the chat is required")
        system = text_of(values.get(fields.get("system", "")), fields.get("system", "system"))
        return read_turns(values[column], column, system=system), None
    named = [fields[field] for field in (*REQUIRED, "rejected") if field in fields]
    found = [values.get(column) for column in named]
    is_chat = any(isinstance(value, list) for value in found)
    if not is_chat or ("rejected" not in fields and format_ != "prompt_completion"):
        return None, None
    if "rejected" not in fields:
        asked = as_turns(found[0], named[0], "user")
        return [*untrained(asked), *as_turns(found[1], named[1], "assistant")], None
    if text_of(values.get(fields.get("context", "")), fields.get("context", "")).strip():
        raise BadValueError(
            f"{fields['context']} beside a chat",
            "the turns are the whole question; set context = '' to leave it out",
        )
    return read_pair(found, named)


def _halves(text: str) -> tuple[str, str]:
    """Divide a text after its middle, in front of a space where there is one; the second half is not blank."""
    middle = len(text.rstrip()) // 2
    spaces = [i for i, c in enumerate(text[:middle]) if c.isspace()]
    cut = spaces[-1] if spaces else middle
    return text[:cut], text[cut:]


def _field(values: Mapping[str, Any], field: str, column: str) -> str:
    if field not in (*REQUIRED, "rejected", "text"):
        return text_of(values.get(column), column)
    if column not in values:
        raise BadValueError(f"no {column}", f"the {field} is required")
    text = text_of(values[column], column)
    if not text.strip():
        raise BadValueError(f"{column} is empty", f"the {field} must contain text")
    return text


def _label_column(table: DataTable, fields: Mapping[str, str], label: Label) -> str:
    column = fields.get("category", "category") if label.column == "category" else label.column
    if column not in table.columns:
        raise DataError(
            f"{table.source}: no column {column!r} among [{names_shown(table.columns)}]",
            "data.partition.column must name one of the columns",
            "set data.partition.column to one of these names",
        )
    return column


def _label(record: Record, column: str, label: Label) -> str:
    """Return a label as text; ids are often whole numbers."""
    text = one_label(text_of(record.values.get(column), column))
    if isinstance(record.values.get(column), Number) and whole_number(record.values[column]) is None:
        raise BadValueError(f"{column} is not a whole number", "it must be text or a whole number")
    if not text:
        raise BadValueError(f"{column} is empty", label.rule)
    return text
