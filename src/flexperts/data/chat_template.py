"""A tokenizer's chat template: a probe conversation shows what it writes around a question and an answer.

A training example is the template's rendering of the whole conversation. The prompt is what the template writes
before an answer, and that rendering must begin with it. The answer ends with what the template writes to end a
turn, or with EOS where the template writes no such token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from flexperts.data.tokens import TokenEncoder
from flexperts.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, str]]
_QUESTION, _ANSWER = "zqxquestion", "zqxanswer"
"""Words that no template writes by itself."""
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_DATE_CODES = "aAbBcCdDeFgGhHIjklmMnpPrRSTuUVwWxXyYzZ"


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

    def prompt(self, messages: Messages) -> list[int]:
        """Return a conversation's tokens, up to where the next answer starts."""
        return self.tokens.encode(self._asked(self.tokens.mark(list(messages))))

    def turn(self, messages: Messages, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a conversation's prompt, and the tokens of the answer up to the one that ends it."""
        marked = self.tokens.mark([*messages, {"role": "assistant", "content": answer}])
        asked, whole = self._asked(marked[:-1]), self._render(marked)
        rest = whole.removeprefix(asked)
        if not (whole.startswith(asked) and rest.endswith(self._tail)):
            raise DataError(
                "the chat template",
                "its rendering of this conversation does not begin with the prompt",
                "set model.template = 'alpaca', or use another chat template",
            )
        rest = rest[: len(rest) - len(self._tail)]
        _check_kept(marked[-1]["content"], rest, "answer")
        prompt = self.tokens.encode(asked)
        return prompt, [*self.tokens.encode_after(prompt, asked, rest + self._end), *self._eos]

    def _asked(self, marked: Messages) -> str:
        text = self._render(marked, add_generation_prompt=True)
        for message in marked:
            if message["role"] != "assistant":  # some templates leave the thinking of earlier answers out
                _check_kept(message["content"], text, f"{message['role']}'s turn")
        return text

    def _render(self, messages: Messages, **options: Any) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, chat_template=self._clock + self.template, **options
            )
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
        found = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self._clock + self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = [i for i, m in zip(found["input_ids"], found["assistant_masks"], strict=True) if m]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        tail = text[_find(text, _ANSWER) + len(_ANSWER) :]
        return tail if self._tail.startswith(tail) else ""


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


def _find(text: str, word: str) -> int:
    """Return the last position of a probe word in a text, or -1; templates may change its case."""
    return max((match.start() for match in re.finditer(word, text, re.IGNORECASE)), default=-1)


def _check_kept(text: str, rendered: str, what: str) -> None:
    """Refuse a rendering that lost a text; white space and case are ignored."""
    plain, within = ("".join(t.casefold().split()) for t in (text, rendered))
    if plain not in within and _escaped(text) not in rendered:
        raise DataError(
            "the chat template",
            f"it must write the {what} unchanged, and does not",
            "change the text, or set model.template = 'alpaca'",
        )


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
