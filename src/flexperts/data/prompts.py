"""Rows as tokens: one code path for training, calibration, evaluation and chat.

Instruct models use the chat template of their tokenizer, base models the alpaca template of the FLEx paper's code.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import regex

from flexperts.config.data import LossOn, Template
from flexperts.config.run import RunConfig
from flexperts.data.chat_template import ChatTemplate, Span
from flexperts.data.rows import Row
from flexperts.data.tokens import TokenEncoder, set_pad_token
from flexperts.errors import ConfigError, DataError, FlexpertsError

ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt in the FLEx paper's code."""
_SAID = frozenset({"tool_calls", "reasoning_content", "reasoning", "thinking"})
"""Fields of a turn that say something."""


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Args:
        input_ids: Prompt, response and end token.
        prompt_length: Number of prompt tokens, all tokens before the last answer.
        cut: Whether the context was cut, or a chat's oldest turns were left out.
        earlier: Spans of the prompt's tokens that are trained besides the response: a chat's earlier answers.
        rejected: The same prompt with the rejected answer; None where a row is not used as a preference.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    cut: bool = False
    earlier: tuple[Span, ...] = ()
    rejected: Example | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.input_ids[: self.prompt_length]

    @property
    def response_length(self) -> int:
        """Number of response tokens, with the end token."""
        return len(self.input_ids) - self.prompt_length

    @property
    def spans(self) -> tuple[Span, ...]:
        """Start and end of the trained tokens, in order: the loss is computed on these."""
        return (*self.earlier, (self.prompt_length, len(self.input_ids)))

    @property
    def trained_tokens(self) -> int:
        """Number of trained tokens."""
        return sum(end - start for start, end in self.spans)

    @property
    def trained_columns(self) -> int:
        """Number of tokens from the first trained one on."""
        return len(self.input_ids) - self.spans[0][0]

    @property
    def forms(self) -> tuple[Example, ...]:
        """What is read of the row: itself, and with the rejected answer too where it is used as a preference."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def length(self) -> int:
        """Number of tokens, of the longer form."""
        return max(len(form.input_ids) for form in self.forms)


class PromptEncoder:
    """Encoder of rows for one tokenizer; control tokens in a row's texts become plain characters.

    Args:
        tokenizer: A transformers tokenizer; its pad token is set to a token other than EOS.
        template: ``"chat"``, ``"alpaca"`` or ``"auto"`` (chat where the tokenizer has a chat template).
        max_length: Longest example in tokens; to fit, contexts are cut and a chat's oldest turns are left out.
        settings: Variables of the chat template.
        date: The date (ISO) that a chat template gets when it asks for today's date; None is today.
        vocabulary: Rows of the base's embedding; None where unknown.
        positions: Longest input of the base, in tokens; None where unknown.
        loss_on: Which of a chat's answers are trained: all or the last.
        pairs: Whether preference rows are used with both answers.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template = "auto",
        max_length: int = 512,
        *,
        settings: Mapping[str, Any] | None = None,
        date: str | None = None,
        vocabulary: int | None = None,
        positions: int | None = None,
        loss_on: LossOn = "all",
        pairs: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.positions = tokenizer, max_length, positions
        self.loss_on, self.pairs = loss_on, pairs
        if positions is not None and max_length > positions:
            raise ConfigError(
                f"training.max_length = {max_length}",
                f"the base reads at most {positions} tokens",
                f"set it to {positions} or less",
            )
        has_chat = bool(tokenizer.chat_template)
        if template == "chat" and not has_chat:
            raise ConfigError("model.template = 'chat'", "the tokenizer has no chat template", "set it to 'alpaca'")
        is_chat = has_chat if template == "auto" else template == "chat"
        if not is_chat and tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer",
                "it has no EOS token, so the model could not learn to stop",
                "set the tokenizer's eos_token",
            )
        set_pad_token(tokenizer, vocabulary)
        self.chat = ChatTemplate(tokenizer, settings, date, vocabulary) if is_chat else None
        """The chat template; None where the alpaca template is used."""
        written = str(tokenizer.chat_template or "")
        self.tokens = self.chat.tokens if self.chat else TokenEncoder(tokenizer, vocabulary, written)
        self.end_token: int = self.chat.end_token if self.chat else tokenizer.eos_token_id
        """The token that ends an answer."""

    @property
    def date(self) -> str | None:
        """The date (ISO) that the chat template gets; None where it does not ask for one."""
        return self.chat.date if self.chat else None

    @property
    def notices(self) -> list[str]:
        """Surprising findings about the template, one line each."""
        return self.chat.notices if self.chat else []

    def prompt(self, instruction: str, context: str = "") -> list[int]:
        """Return the prompt's tokens, up to where the response starts."""
        if self.chat:
            return self.chat.prompt(_asking(instruction, context))
        return [*self.tokens.beginning, *self.tokens.encode(self._alpaca(instruction, context))]

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return a conversation's tokens, up to where the next response starts.

        The alpaca template has one instruction: the last turn. The earlier turns become its input.

        Args:
            messages: Turns with ``role`` (system, user, assistant) and ``content``; the last one is the user's.
        """
        roles = [message["role"] for message in messages]
        if roles[-1:] != ["user"] or not {*roles} <= {"system", "user", "assistant"}:
            raise ConfigError(
                f"messages with the roles {roles}",
                "roles are system, user and assistant, and the last message is the user's",
                "end the conversation with a message of the role user",
            )
        if self.chat:
            return self.chat.prompt(messages)
        return self.prompt(messages[-1]["content"], _as_context(messages[:-1]))

    def encode(self, row: Row) -> Example:
        """Return the row's tokens. Of a row that is too long, the context is cut at its end, between characters; a
        chat's oldest turns are left out, but not its system turn; plain text is cut at its end. Both answers of a
        preference get the same prompt.
        """
        try:
            example = self._plain(row) if row.plain else self._example(row)
            if example.length > self.max_length:
                example = replace(self._shortened(row, example), cut=True)
        except FlexpertsError as error:
            raise DataError(f"{row.where or 'a row'}: {error.value}", error.rule, error.remedy) from error
        return example

    def encode_all(self, rows: Sequence[Row]) -> list[Example]:
        """Encode rows in order."""
        return [self.encode(row) for row in rows]

    def _example(self, row: Row) -> Example:
        """Return a row's tokens, however many they are."""
        example = self._form(row)
        return replace(example, rejected=self._form(row.with_rejected)) if self.pairs and row.rejected else example

    def _form(self, row: Row) -> Example:
        """Return a row's tokens with its response."""
        if self.chat:
            messages = messages_of(row)
            trained = [i for i in self._trained(row) if i < len(messages) - 1]
            prompt, response, earlier = self.chat.conversation(messages, trained, row.extras.get("tools", ()))
            return Example((*prompt, *response), len(prompt), earlier=tuple(earlier))
        if row.between or not _SAID.isdisjoint(key for message in messages_of(row) for key in message):
            raise DataError(
                "a chat with calls of tools, or with thinking",
                "the alpaca template cannot write them",
                "use a base with a chat template, or leave these fields out",
            )
        context = _as_context([message.mapping for message in row.before]) if row.before else row.context
        asked, answer = self._alpaca(row.instruction, context), self.tokens.mark(row.response)
        before = self.tokens.encode(asked)
        response = self.tokens.encode_after(before, asked, answer)
        prompt = [*self.tokens.beginning, *before]
        return Example((*prompt, *response, self.end_token), len(prompt))

    def _trained(self, row: Row) -> list[int]:
        """Return the numbers of a chat's earlier answers that are trained."""
        turns = [*row.before, None, *row.between]
        is_trained = [turn is not None and turn.role == "assistant" and turn.trained for turn in turns]
        return [i for i, trained in enumerate(is_trained) if trained and self.loss_on == "all"]

    def _plain(self, row: Row) -> Example:
        """Return a plain text's tokens; nothing is predicted before its first token, and all others are trained."""
        first, whole = (self.tokens.plain(text) for text in (row.instruction, row.instruction + row.response))
        end = self.tokenizer.eos_token_id
        whole.append(self.end_token if end is None else end)
        whole = whole[: self.max_length]
        same = next((i for i, (a, b) in enumerate(zip(first, whole, strict=False)) if a != b), len(first))
        half = min(max(1, same), len(whole) - 1)
        cut = whole[-1] not in (end, self.end_token)
        return Example(tuple(whole), half, cut, earlier=((1, half),) if half > 1 else ())

    def _alpaca(self, instruction: str, context: str) -> str:
        parts = {"with_input": "", "input": ""}
        if context:
            parts = {
                "with_input": ", paired with an input",
                "input": f"### Input:\n{self.tokens.mark(context)}\n\n",
            }
        return ALPACA.format(instruction=self.tokens.mark(instruction), **parts)

    def _shortened(self, row: Row, example: Example) -> Example:
        shorter, without = (self._with_less_context, "context")
        if row.before:
            shorter, without = (self._with_fewer_turns, "earlier turns")
        found = shorter(row, example.length)
        if isinstance(found, Example):
            return found
        raise DataError(
            f"{found} tokens without {without}",
            f"training.max_length = {self.max_length} must hold instruction and response",
            "raise training.max_length, shorten the row, or set data.on_bad_row = 'drop'",
        )

    def _with_less_context(self, row: Row, length: int) -> Example | int:
        """Return the example with the longest context that fits; without one, its length in tokens."""
        ends = self._cuts(row.context)
        while ends:
            # Cutting can merge or split tokens at the seam, so measure again rather than trust the count.
            del ends[max(0, len(ends) - (length - self.max_length)) :]
            example = self._example(replace(row, context=row.context[: ends[-1]] if ends else ""))
            length = example.length
            if length <= self.max_length:
                return example
        return length

    def _with_fewer_turns(self, row: Row, length: int) -> Example | int:
        """Return the example with most turns that fits; without one, its length in tokens."""
        system = next((i for i, turn in enumerate(row.before) if turn.role != "system"), len(row.before))
        starts = [i for i, turn in enumerate(row.before) if turn.role == "user" and i > system]

        def without(start: int) -> Example:
            return self._example(replace(row, before=(*row.before[:system], *row.before[start:])))

        starts.append(len(row.before))
        fits = bisect_left(starts, True, key=lambda start: without(start).length <= self.max_length)
        example = without(starts[min(fits, len(starts) - 1)])
        return example if fits < len(starts) else example.length

    def _cuts(self, text: str) -> list[int]:
        """Return where a text may be cut: after a visible character, and at a token's end where that is known."""
        characters = {match.end() for match in regex.finditer(r"\X", text)}
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            characters &= {end for _, end in found["offset_mapping"]}
        return sorted(characters)


def encoder_of(config: RunConfig, tokenizer: Any, described: Any) -> PromptEncoder:
    """Return the encoder of a run.

    Args:
        config: The run's configuration.
        tokenizer: The base's tokenizer.
        described: transformers' configuration of the base.
    """
    text, model = described.get_text_config(), config.model
    return PromptEncoder(
        tokenizer,
        model.template,
        config.training.max_length,
        settings=model.chat_template_kwargs,
        date=model.template_date,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
        loss_on=config.data.loss_on,
        pairs=config.training.objective == "dpo",
    )


def messages_of(row: Row) -> list[dict[str, Any]]:
    """Return a row as the turns that a chat template reads; the last one is the response."""
    extras = row.extras
    asked = _asking(row.instruction, row.context)[0] | extras.get("user", {})
    answer = {"role": "assistant", "content": row.response} | extras.get("assistant", {})
    before, between = ([message.mapping for message in turns] for turns in (row.before, row.between))
    return [*before, asked, *between, answer]


def _as_context(before: Sequence[Mapping[str, Any]]) -> str:
    """Return earlier turns as one text, for a template that has no turns."""
    lines = [m["content"] if m["role"] == "system" else f"{m['role']}: {m['content']}" for m in before]
    return "\n\n".join(lines)


def _asking(instruction: str, context: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]
