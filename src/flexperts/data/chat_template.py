"""A tokenizer's chat template: a probe conversation shows what it writes around a question and an answer.

A training example is the template's rendering of the whole conversation. The prompt is what the template writes
before the last answer, and that rendering must begin with it. The answer ends with what the template writes to end
a turn, or with EOS where the template writes no such token. Earlier answers are in the prompt: they are where the
template marks generated text, else where the renderings of shorter conversations begin and end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from flexperts.data.tokens import TokenEncoder
from flexperts.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
"""Start and end, of characters or tokens."""
_QUESTION, _ANSWER = "zqxquestion", "zqxanswer"
"""Words that no template writes by itself."""
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_OTHER = "change the text, or set model.template = 'alpaca'"
_NO_TOOLS = "use a base whose chat template writes them, or leave them out of the rows"
_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_DATE_CODES = "aAbBcCdDeFgGhHIjklmMnpPrRSTuUVwWxXyYzZ"


class Conversation(NamedTuple):
    """A conversation's tokens.

    Args:
        prompt: Tokens up to where the last answer starts.
        answer: Tokens of the last answer, up to the one that ends it.
        earlier: Spans of the earlier answers that are trained, in tokens of the prompt.
    """

    prompt: list[int]
    answer: list[int]
    earlier: list[Span]


class ChatTemplate:
    """A chat template in use.

    Args:
        tokenizer: The tokenizer that has the template.
        settings: Variables of the template, such as ``enable_thinking``.
        date: The date (ISO) that a template gets when it asks for today's date; None is today.
        vocabulary: Rows of the base's embedding; None where unknown.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: Mapping[str, Any] | None = None,
        date: str | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        own = _default(tokenizer)
        self.date = (date or f"{datetime.now():%Y-%m-%d}") if "strftime_now" in own else None
        """The date (ISO) that the template gets; None where it does not ask for one."""
        self._clock = _clock(self.date) if self.date else ""
        self.template = "".join(_assignment(name, value) for name, value in (settings or {}).items()) + own
        """The template with these settings and, where it had none, a generation prompt.

        It renders the same in any other program.
        """
        self.notices: list[str] = []
        asked, whole = self._probe()
        self.tokens = TokenEncoder(tokenizer, vocabulary, f"{own}\0{asked}\0{whole}")
        self._tail = whole[_find(whole, _ANSWER) + len(_ANSWER) :]
        self._end = self._end_of_turn()
        controls = self.tokens.controls_in(self._end)
        if not controls and tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer",
                "it has no EOS token, and its chat template writes no token that ends a turn",
                "set the tokenizer's eos_token",
            )
        self.end_token: int = self.tokens.id_of(controls[-1][0]) if controls else tokenizer.eos_token_id
        """The token that ends an answer."""
        self._eos = [] if controls else [self.end_token]
        self.tokens.checked([self.end_token])

    def prompt(self, messages: Messages, tools: Tools = ()) -> list[int]:
        """Return a conversation's tokens, up to where the next answer starts.

        Args:
            messages: Turns with ``role``, ``content`` and what else the template reads.
            tools: The tools that may be called.
        """
        return self.tokens.encode(self._asked(*self.tokens.mark([[*messages], [*tools]])))

    def conversation(self, messages: Messages, trained: Collection[int] = (), tools: Tools = ()) -> Conversation:
        """Return a conversation's tokens, and which of them are trained.

        Args:
            messages: The turns, as for ``prompt``; the last one is an answer, and always trained.
            trained: Numbers of the earlier answers that are trained.
            tools: The tools that may be called.
        """
        marked, tools = self.tokens.mark([[self._with_thinking(m) for m in messages], [*tools]])
        asked, whole = self._asked(marked[:-1], tools), self._render(marked, tools)
        rest = whole.removeprefix(asked)
        calls = bool(marked[-1].get("tool_calls"))
        ends = rest.endswith(self._tail) or (calls and self.tokens.controls_in(rest))
        if not (whole.startswith(asked) and ends):
            raise DataError(
                "the chat template",
                "its rendering of this conversation does not begin with the prompt",
                "set model.template = 'alpaca', or use another chat template",
            )
        if rest.endswith(self._tail):
            rest = rest[: len(rest) - len(self._tail)] + self._end
        else:  # some templates end a call of a tool with another token than an answer
            rest = rest[: self.tokens.controls_in(rest)[-1].end()]
        _check_kept(marked[-1]["content"], rest, "answer")
        _check_kept(marked[-1].get("reasoning_content", ""), rest, "answer's thinking")
        _check_calls(marked, tools, whole)
        prompt = self.tokens.encode(asked)
        found = [
            self._in_tokens(prompt, asked, span) for span in self._earlier(marked, trained, tools, whole, asked)
        ]
        return Conversation(prompt, [*self.tokens.encode_after(prompt, asked, rest), *self._eos], found)

    def _with_thinking(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a turn whose thinking, if it is in the text, is in the field that the template reads."""
        turn = dict(message)
        found = _THINKING.match(turn["content"]) if turn["role"] == "assistant" else None
        if found and "reasoning_content" in self.template and not turn.get("reasoning_content"):
            turn |= {"reasoning_content": found[1].strip("\n"), "content": turn["content"][found.end() :]}
        return turn

    def _earlier(
        self, marked: Messages, trained: Collection[int], tools: Tools, whole: str, asked: str
    ) -> list[Span]:
        """Return the spans of earlier answers in the rendered text, in characters."""
        if not trained:
            return []
        answers = [i for i, message in enumerate(marked) if message["role"] == "assistant"]
        if _GENERATION.search(self.template):
            found = self._marked_spans(marked, tools)
            if len(found) == len(answers):
                return [found[answers.index(i)] for i in trained]
            if len(trained) == len(answers) - 1:
                return [(start, min(end, len(asked))) for start, end in found if start < len(asked)]
        elif all(exact := [self._by_prefix(marked, i, tools, whole) for i in trained]):
            return [span for span in exact if span]
        elif spans := self._by_header(marked, answers, tools, whole):
            return [spans[answers.index(i)] for i in trained]
        raise DataError(
            "the chat template",
            "it does not show where the earlier answers of this chat are",
            "set data.loss_on = 'last', or use a chat template with {% generation %} marks",
        )

    def _by_prefix(self, marked: Messages, turn: int, tools: Tools, whole: str) -> Span | None:
        """Return an answer's span, if the conversation begins as the conversation that ends with it."""
        try:
            asked = self._render(marked[:turn], tools, add_generation_prompt=True)
            upto = self._render(marked[: turn + 1], tools)
        except ConfigError:  # a conversation that ends there may be against the template's rules
            return None
        end = upto[: len(upto) - len(self._tail)] + self._end
        fits = upto.endswith(self._tail) and whole.startswith(asked) and whole.startswith(end)
        return (len(asked), len(end)) if fits and len(asked) < len(end) else None

    def _by_header(self, marked: Messages, answers: Sequence[int], tools: Tools, whole: str) -> list[Span]:
        """Return every answer's span: from the text that the template writes before answers, to the turn's end."""
        header, end = self._around
        starts = [match.end() for match in header.finditer(whole)] if header else []
        if len(starts) != len(answers):
            return []
        spans = []
        for answer, start, following in zip(answers, starts, [*starts[1:], len(whole)], strict=True):
            stop = end.search(whole, start, min(following, self._next_text(marked, answer, tools, whole)))
            if not stop and following < len(whole):  # such as a call of a tool that ends with another token
                return []
            spans.append((start, stop.end() if stop else following))
        return spans

    def _next_text(self, marked: Messages, turn: int, tools: Tools, whole: str) -> int:
        """Return where the text of the turn after this one starts: up to there, any other text gives the same."""
        if turn + 1 == len(marked):
            return len(whole)
        other = [*marked[: turn + 1], {**marked[turn + 1], "content": _QUESTION}, *marked[turn + 2 :]]
        return _shared(whole, self._render(other, tools))

    @cached_property
    def _around(self) -> tuple[re.Pattern[str] | None, re.Pattern[str]]:
        """What the template writes before every answer, if it has control tokens, and what may end an answer."""
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        nothing = None, re.compile("(?!)")
        try:
            bare, asked = self._render([question]), self._render([question], add_generation_prompt=True)
            whole = self._render([question, answer, question, answer])
        except ConfigError:
            return nothing
        before, _, after = whole.partition(_ANSWER)
        own = before.removeprefix(bare)
        header = own[: _shared(own, asked.removeprefix(bare))]
        controls = self.tokens.controls_in(after)
        if not (before.startswith(bare) and controls and self.tokens.controls_in(header)):
            return nothing
        ends = [end for end in (self._end, after[: controls[0].end()]) if end]
        # Where no token ends a turn, the next turn's token does; it is not part of the answer.
        within = "|".join(map(_written, ends)) if self._end else f"(?={_written(ends[-1])})"
        return re.compile(_written(header)), re.compile(within)

    def _in_tokens(self, ids: Sequence[int], text: str, span: Span) -> Span:
        """Return a span of characters in tokens; a token that is partly inside belongs to it."""
        start, end = (self.tokens.encode(text[:position]) for position in span)
        last = _shared(ids, end)
        return _shared(ids, start), last + (last < len(end))

    def _asked(self, marked: Messages, tools: Tools) -> str:
        text = self._render(marked, tools, add_generation_prompt=True)
        for message in marked:
            if message["role"] != "assistant":  # some templates leave the thinking of earlier answers out
                _check_kept(message["content"], text, f"{message['role']}'s turn")
        return text

    def _render(self, messages: Messages, tools: Tools = (), **options: Any) -> str:
        given = {"chat_template": self._clock + self.template, "tools": [*tools] or None}
        try:
            rendered: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **given, **options)
        except Exception as error:  # a template is a program
            told = _told(error, messages)
            raise ConfigError(
                "the messages",
                f"the model's chat template refuses them ({told})",
                "use the roles, and the order of turns, that the template accepts",
            ) from error
        return rendered

    def _probe(self) -> tuple[str, str]:
        """Render a prompt and a whole conversation; add a generation prompt to a template that has none."""
        question = [{"role": "user", "content": _QUESTION}]
        both = [*question, {"role": "assistant", "content": _ANSWER}]
        try:
            asked, bare = self._render(question, add_generation_prompt=True), self._render(question)
            whole = self._render(both)
        except ConfigError as error:
            raise ConfigError(
                "the tokenizer's chat template",
                error.rule,
                "correct the template, or set model.template = 'alpaca'",
            ) from error
        for word, text, what in (
            (_QUESTION, asked, "question"),
            (_QUESTION, whole, "question"),
            (_ANSWER, whole, "answer"),
        ):
            if _find(text, word) < 0:
                raise ConfigError(
                    "the tokenizer's chat template",
                    f"it does not write the {what}",
                    "correct the template, or set model.template = 'alpaca'",
                )
        before = whole[: _find(whole, _ANSWER)]
        if asked == bare and before.startswith(bare) and (header := before[len(bare) :].rstrip(" ")):
            self.template += _if_asked(header)
            self.notices.append(
                "the chat template has no generation prompt: the text that it writes before an answer is used"
            )
            asked = self._render(question, add_generation_prompt=True)
        if not before.startswith(asked):
            raise ConfigError(
                "the tokenizer's chat template",
                "its prompt differs from the text that it writes before an answer in a conversation",
                "choose a variant of the template with model.chat_template_kwargs (often enable_thinking = false), "
                "or set model.template = 'alpaca'",
            )
        return asked, whole

    def _end_of_turn(self) -> str:
        """Return the text that ends an answer: as the template marks it, else its first control tokens."""
        marked = self._marked_tail() if _GENERATION.search(self.template) else ""
        if controls := self.tokens.controls_in(marked):
            return marked[: controls[-1].end()]
        end = 0
        for control in self.tokens.controls_in(self._tail):
            if end and control.start() != end:
                break
            end = control.end()
        return self._tail[:end]

    def _marked_tail(self) -> str:
        """Return the text after an answer that the template marks as generated."""
        messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        [*_, (start, end)] = self._marked_spans(messages)
        text = self._render(messages)[start:end]
        tail = text[_find(text, _ANSWER) + len(_ANSWER) :]
        return tail if self._tail.startswith(tail) else ""

    def _marked_spans(self, messages: Messages, tools: Tools = ()) -> list[Span]:
        """Return the spans that the template marks as generated, in characters of its rendering."""
        _, [spans] = render_jinja_template(
            [list(messages)],
            tools=[*tools] or None,
            chat_template=self._clock + self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in spans]


def _default(tokenizer: Any) -> str:
    """Return the tokenizer's template."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ConfigError(
            f"the tokenizer's chat templates {names}",
            "one of several templates must be called default",
            "save the tokenizer with the one you want as its only template, or set model.template = 'alpaca'",
        ) from error
    return template


def _written(text: str) -> str:
    """Return a pattern of a text that the template writes: control tokens in texts of others are marked."""
    return f"(?<!\U000f0000){re.escape(text)}"


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _find(text: str, word: str) -> int:
    """Return the last position of a probe word in a text, or -1; templates may change its case."""
    return max((match.start() for match in re.finditer(word, text, re.IGNORECASE)), default=-1)


def _check_kept(text: str, rendered: str, what: str, remedy: str = _OTHER) -> None:
    """Refuse a rendering that lost a text; white space and case are ignored."""
    plain, within = ("".join(t.casefold().split()) for t in (text, rendered))
    if plain not in within and _escaped(text) not in rendered:
        raise DataError(
            "the chat template",
            f"it must write the {what} unchanged, and does not",
            remedy,
        )


def _check_calls(messages: Messages, tools: Tools, rendered: str) -> None:
    """Refuse a rendering that lost a call of a tool, or a tool's description."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            _check_kept(call["function"]["name"], rendered, "call of a tool", _NO_TOOLS)
    for tool in tools:
        _check_kept(str(tool.get("function", tool).get("name", "")), rendered, "tool's description", _NO_TOOLS)


def _escaped(text: str) -> str:
    """Return a text as templates that turn messages into JSON write it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _told(error: Exception, messages: Messages) -> str:
    """Return an error's type, and its message where that repeats no word of the conversation."""
    said = next(iter(str(error).strip().splitlines()), "")[:200]
    words = {word for message in messages for word in str(message["content"]).split()}
    return type(error).__name__ if not said or words & set(said.split()) else f"{type(error).__name__}: {said}"


def _literal(value: Any) -> str:
    """Return a value as a Jinja literal."""
    if isinstance(value, str):
        escaped = value.encode("unicode_escape").decode().replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return str(value).lower()


def _assignment(name: str, value: Any) -> str:
    # The empty text keeps a line break at the template's start; directly after a block, Jinja would remove it.
    return f"{{% set {name} = {_literal(value)} %}}{{{{ '' }}}}"


def _if_asked(prompt: str) -> str:
    return f"{{% if add_generation_prompt %}}{{{{ {_literal(prompt)} }}}}{{% endif %}}"


def _clock(date: str) -> str:
    """Return a macro that fixes the template's date: a run's prompts must not change overnight."""
    day = datetime.fromisoformat(date)
    codes = {f"%{flag}{code}": day.strftime(f"%{flag}{code}") for flag in ("-", "") for code in _DATE_CODES}
    order = {"%%": "\0", **codes, "\0": "%"}
    replaced = "".join(f"|replace({_literal(code)}, {_literal(value)})" for code, value in order.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}"
