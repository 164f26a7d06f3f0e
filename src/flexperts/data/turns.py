"""The turns of a chat, from the common ways to write them: OpenAI's messages and ShareGPT's conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexperts.data.bad_rows import BadValueError, kind_of, text_of
from flexperts.data.records import Number

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Names of roles in files -> the role that chat templates know."""
_TEXT_KEYS = ("content", "value")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Args:
        role: system, user, assistant or tool.
        content: Its text.
        more: JSON object of its other fields that a template may write, such as ``tool_calls``; may be empty.
        trained: Whether an assistant's turn is trained; the others never are.
    """

    role: str
    content: str
    more: str = ""
    trained: bool = True

    @property
    def mapping(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


@dataclass(frozen=True, slots=True)
class Chat:
    """The parts of a chat; most become the fields of a row of the same names.

    Args:
        instruction: Text of the last user turn.
        response: Text of the last assistant turn.
        before: The turns before the last user turn.
        between: The turns between the last user turn and the response: tool calls and their results.
        kept: JSON object of what a template may write besides; see ``Row``.
        rejected: Text of the rejected answer; empty in a chat that is no preference.
        first: Text of the first user turn, which identifies the chat.
        unanswered: Number of turns after the last assistant turn, which are left out.
    """

    instruction: str
    response: str
    before: tuple[Message, ...]
    between: tuple[Message, ...]
    kept: str
    rejected: str
    first: str
    unanswered: int

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a row."""
        names = ("instruction", "response", "before", "between", "kept", "rejected")
        return {name: getattr(self, name) for name in names}


def read_chat(turns: Sequence[Message], tools: Any = None, rejected: Message | None = None) -> Chat:
    """Return the parts of a chat.

    Args:
        turns: All turns.
        tools: Descriptions of the tools that the assistant may call, as a list of objects or its JSON.
        rejected: Another last answer, which the silo likes less.

    Raises:
        BadValueError: The chat has no answer after a user's turn.
    """
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    last = answers[-1] if answers else 0
    asked = [i for i, turn in enumerate(turns[:last]) if turn.role == "user"]
    if not asked:
        raise BadValueError(
            "the chat has no answer to a user", "it needs a user's turn and an assistant's turn after it"
        )
    question, answer = turns[asked[-1]], turns[last]
    if not answer.trained:
        raise BadValueError("the last answer has weight 0", "the last assistant turn is always trained")
    kept = {"tools": _tools(tools)}
    for name, turn in (("user", question), ("assistant", answer), ("rejected", rejected)):
        kept[name] = json.loads(turn.more) if turn and turn.more else {}
    kept = {name: value for name, value in kept.items() if value}
    return Chat(
        question.content,
        answer.content,
        tuple(turns[: asked[-1]]),
        tuple(turns[asked[-1] + 1 : last]),
        _json(kept) if kept else "",
        rejected.content if rejected else "",
        turns[asked[0]].content,
        len(turns) - last - 1,
    )


def read_turns(value: Any, column: str, *, system: str = "") -> list[Message]:
    """Return the turns in a column's value.

    Args:
        value: A list of objects with ``role`` and ``content``, or ``from`` and ``value``; or its JSON.
        column: The column, for messages.
        system: A system turn that the file has in another column; may be empty.
    """
    found = _parsed(value)
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise BadValueError(f"{column} is {kind_of(value)}", "a chat is a list of objects with role and content")
    turns = [_turn(turn, f"{column}, turn {number}") for number, turn in enumerate(found, 1)]
    return [Message("system", system), *turns] if system.strip() else turns


def read_pair(values: Sequence[Any], columns: Sequence[str]) -> tuple[list[Message], Message]:
    """Return a preference's turns up to the chosen answer, and the rejected answer.

    The forms are TRL's: a prompt and two answers, each of them text or turns, or two chats that hold the prompt.

    Args:
        values: Prompt, chosen and rejected answer; the prompt may be None.
        columns: Their columns, for messages.

    Raises:
        BadValueError: They are not one conversation with two last answers.
    """
    prompt, *answers = values
    asked = as_turns(prompt, columns[0], "user") if prompt else []
    first, second = (as_turns(v, c, "assistant") for v, c in zip(answers, columns[1:], strict=True))
    if first[: len(asked)] == asked or (not isinstance(prompt, list) and first[0].role != "assistant"):
        asked = []
    *shared, answer = *asked, *first
    *other, worse = *asked, *second
    if shared != other or {answer.role, worse.role} != {"assistant"}:
        raise BadValueError(
            f"{columns[1]} and {columns[2]} differ before their last turn, or do not end with the assistant's",
            "they must be one conversation with two last answers",
        )
    if not worse.content.strip():
        raise BadValueError(f"{columns[2]} is empty", "the rejected answer must contain text")
    return [*untrained(shared), answer], worse


def as_turns(value: Any, column: str, role: str) -> list[Message]:
    """Return a value as turns: a text is one turn of a role.

    Args:
        value: A text, or what ``read_turns`` reads, with at least one turn.
        column: The column, for messages.
        role: The role of a text.
    """
    if value == []:
        raise BadValueError(f"{column} is empty", "it must contain a turn")
    return read_turns(value if isinstance(value, list) else [{"role": role, "content": value}], column)


def untrained(turns: Sequence[Message]) -> list[Message]:
    """Return the turns of a prompt: no answer in them is trained."""
    return [replace(turn, trained=False) for turn in turns]


def _turn(given: Mapping[str, Any], place: str) -> Message:
    name = given.get("role", given.get("from"))
    if not isinstance(name, str) or (role := _ROLES.get(name.strip().casefold())) is None:
        raise BadValueError(f"{place} has no known role", "roles are system, user, assistant and tool")
    key = next((key for key in _TEXT_KEYS if given.get(key) is not None), "")
    text = _text(given.get(key), place)
    others = {k: v for k, v in given.items() if k not in ("role", "from", *_TEXT_KEYS)}
    weight = _plain(others.pop("weight", None), place)
    more: dict[str, Any] = _plain(others, place)
    if name.strip().casefold() == "function_call":
        call = _parsed(text)
        if not isinstance(call, dict) or "name" not in call:
            raise BadValueError(f"{place} is no function call", "it must be JSON with a name and arguments")
        text, more = "", more | {"tool_calls": [_plain(call, place)]}
    if calls := more.get("tool_calls"):
        more["tool_calls"] = [_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]
    if not text.strip() and role in ("user", "assistant") and not calls:
        raise BadValueError(f"{place} is empty", f"the {role}'s turn must contain text")
    return Message(role, text, _json(more) if more else "", trained=weight is None or bool(weight))


def _text(value: Any, place: str) -> str:
    """Return a turn's text; parts of text are joined."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise BadValueError(
                f"{place} has a part that is not text", "only text can be read, no images or sounds"
            )
        value = "".join(texts)
    return text_of(value, place)


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call as templates read it: a function with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadValueError(f"{place} has a tool call without a name", "a tool call has a function with a name")
    arguments = _parsed(function.get("arguments", {}))
    made = function | {"arguments": _plain(arguments, place)}
    return {**call, "function": made} if "function" in call else {"type": "function", "function": made}


def _tools(value: Any) -> list[Any]:
    found = _plain(_parsed(value), "tools")
    if found and (not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found)):
        raise BadValueError("tools is not a list of objects", "it describes each tool by an object")
    return found or []


def _parsed(value: Any) -> Any:
    """Return a value, or what it says if it is the text of a JSON list or object."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _plain(value: Any, place: str) -> Any:
    """Return a value of a file as JSON has it; fields that are empty are left out, as Parquet fills them in."""
    if isinstance(value, Number):
        return json.loads(value)
    if isinstance(value, str):
        return text_of(value, place)
    if isinstance(value, dict):
        return {str(k): _plain(v, place) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v, place) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise BadValueError(
        f"{place} has a field that is {kind_of(value)}", "fields are text, numbers, lists and objects"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
