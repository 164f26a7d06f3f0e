"""Rows as tokens: one code path for training, calibration, evaluation and chat.

Instruct models use the chat template of their tokenizer, base models the alpaca template of the FLEx paper's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import regex

from flexperts.config.run import RunConfig
from flexperts.data.chat_template import ChatTemplate
from flexperts.data.rows import Row
from flexperts.data.tokens import TokenEncoder, set_pad_token
from flexperts.errors import ConfigError, DataError, FlexpertsError

Template = Literal["auto", "chat", "alpaca"]

ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt in the FLEx paper's code."""
_Turn = tuple[list[int], list[int]]
"""The tokens of a prompt, and those of its response with the end token."""


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Args:
        input_ids: Prompt, response and end token.
        prompt_length: Number of prompt tokens; the loss is computed on the others.
        cut: Whether the context was cut.
        rejected: The same prompt with the rejected answer; None where a row is not used as a preference.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    cut: bool = False
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
    def forms(self) -> tuple[Example, ...]:
        """What is read of the row: itself, and with the rejected answer too in a preference row."""
        return (self,) if self.rejected is None else (self, self.rejected)


class PromptEncoder:
    """Encoder of rows for one tokenizer; control tokens in a row's texts become plain characters.

    Args:
        tokenizer: A transformers tokenizer; its pad token is set to a token other than EOS.
        template: ``"chat"``, ``"alpaca"`` or ``"auto"`` (chat where the tokenizer has a chat template).
        max_length: Longest example in tokens; contexts are cut to fit, instructions and responses never.
        settings: Variables of the chat template.
        date: The date (ISO) that a chat template gets when it asks for today's date; None is today.
        vocabulary: Rows of the base's embedding; None where unknown.
        positions: Longest input of the base, in tokens; None where unknown.
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
        pairs: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.positions, self.pairs = tokenizer, max_length, positions, pairs
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
        before = [m["content"] if m["role"] == "system" else f"{m['role']}: {m['content']}" for m in messages[:-1]]
        return self.prompt(messages[-1]["content"], "\n\n".join(before))

    def encode(self, row: Row) -> Example:
        """Return the row's tokens; a context that is too long is cut at its end, between characters.

        Both answers of a preference row get the same context.
        """
        try:
            turns = self._turns(row, row.context)
            cut = _longest(turns) > self.max_length
            if cut:
                turns = self._shortened(row, _longest(turns))
        except FlexpertsError as error:
            raise DataError(f"{row.where or 'a row'}: {error.value}", error.rule, error.remedy) from error
        chosen, *rejected = (Example((*prompt, *response), len(prompt), cut) for prompt, response in turns)
        return replace(chosen, rejected=rejected[0]) if rejected else chosen

    def encode_all(self, rows: Sequence[Row]) -> list[Example]:
        """Encode rows in order."""
        return [self.encode(row) for row in rows]

    def _turns(self, row: Row, context: str) -> list[_Turn]:
        """Return the turn with each of the row's answers that is used."""
        answers = [row.response, *([row.rejected] if self.pairs and row.rejected else [])]
        return [self._turn(row.instruction, context, answer) for answer in answers]

    def _turn(self, instruction: str, context: str, response: str) -> _Turn:
        if self.chat:
            return self.chat.turn(_asking(instruction, context), response)
        asked, answer = self._alpaca(instruction, context), self.tokens.mark(response)
        prompt = self.tokens.encode(asked)
        said = self.tokens.encode_after(prompt, asked, answer)
        return [*self.tokens.beginning, *prompt], [*said, self.end_token]

    def _alpaca(self, instruction: str, context: str) -> str:
        parts = {"with_input": "", "input": ""}
        if context:
            parts = {
                "with_input": ", paired with an input",
                "input": f"### Input:\n{self.tokens.mark(context)}\n\n",
            }
        return ALPACA.format(instruction=self.tokens.mark(instruction), **parts)

    def _shortened(self, row: Row, length: int) -> list[_Turn]:
        ends, turns = self._cuts(row.context), list[_Turn]()
        while length > self.max_length:
            if not ends:
                raise DataError(
                    f"{length} tokens without context",
                    f"training.max_length = {self.max_length} must hold instruction and response",
                    "raise training.max_length, shorten the row, or set data.on_bad_row = 'drop'",
                )
            # Cutting can merge or split tokens at the seam, so measure again rather than trust the count.
            del ends[max(0, len(ends) - (length - self.max_length)) :]
            turns = self._turns(row, row.context[: ends[-1]] if ends else "")
            length = _longest(turns)
        return turns

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
        pairs=config.training.objective == "dpo",
    )


def _longest(turns: Sequence[_Turn]) -> int:
    return max(len(prompt) + len(response) for prompt, response in turns)


def _asking(instruction: str, context: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]
