"""Turning a row into tokens: one code path for training, calibration, evaluation and chat.

Instruct models get their own chat template, base models the alpaca template of the FLEx paper's code base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from flexperts.data.rows import Row
from flexperts.errors import ConfigError, DataError

Template = Literal["auto", "chat", "alpaca"]

_ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Args:
        input_ids: Prompt, response and end-of-sequence tokens.
        prompt_length: How many of them are prompt; the loss is taken on the rest.
    """

    input_ids: tuple[int, ...]
    prompt_length: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens up to where the response starts."""
        return self.input_ids[: self.prompt_length]


class PromptEncoder:
    """Encodes rows for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer; its pad token is set to one that differs from EOS.
        template: ``"chat"``, ``"alpaca"`` or ``"auto"`` (chat where the tokenizer has a chat template).
        max_length: Longest example in tokens; contexts are cut to fit, prompts and answers never.

    Raises:
        ConfigError: The template cannot be used with this tokenizer.
    """

    def __init__(self, tokenizer: Any, template: Template = "auto", max_length: int = 512) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        has_chat = bool(tokenizer.chat_template)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer", "it has no EOS token, so nothing could learn to stop", "set eos_token"
            )
        if template == "chat" and not has_chat:
            raise ConfigError("model.template = 'chat'", "the tokenizer has no chat template", "use 'alpaca'")
        self.chat = has_chat if template == "auto" else template == "chat"
        _set_pad_token(tokenizer)
        self.cut = 0

    def prompt(self, instruction: str, context: str = "") -> list[int]:
        """Return the prompt's tokens, up to where the response starts."""
        if not self.chat:
            parts = {"with_input": "", "input": ""}
            if context:
                parts = {"with_input": ", paired with an input", "input": f"### Input:\n{context}\n\n"}
            text = _ALPACA.format(instruction=instruction, **parts)
            return list(self.tokenizer(text)["input_ids"])
        question = f"{instruction}\n\n{context}" if context else instruction
        return self._chat([{"role": "user", "content": question}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return a conversation's tokens, up to where the next response starts.

        The alpaca template knows one instruction: it is the last turn, and the turns before are its input.

        Args:
            messages: Turns with ``role`` (system, user, assistant) and ``content``; the last one is a user's.

        Raises:
            ConfigError: The turns are others than that, or in an order that the chat template refuses.
        """
        roles = [message["role"] for message in messages]
        if roles[-1:] != ["user"] or not {*roles} <= {"system", "user", "assistant"}:
            raise ConfigError(
                f"messages of the roles {roles}",
                "turns are of system, user or assistant, and the last one is a user's",
                "add what the user asks at the end",
            )
        if self.chat:
            return self._chat(messages)
        before = [m["content"] if m["role"] == "system" else f"{m['role']}: {m['content']}" for m in messages[:-1]]
        return self.prompt(messages[-1]["content"], "\n\n".join(before))

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise ConfigError(
                "the messages", f"the model's chat template refuses them ({error})", "follow its order of turns"
            ) from error
        return list(encoded["input_ids"])

    def response(self, text: str) -> list[int]:
        """Return the response's tokens with EOS at the end, so that the model learns to stop."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def encode(self, row: Row) -> Example:
        """Return the row's tokens; a context that is too long is cut at its end, and counted in ``cut``.

        Raises:
            DataError: Even without context the row does not fit ``max_length``.
        """
        response = self.response(row.response)
        prompt = self.prompt(row.instruction, row.context)
        if len(prompt) + len(response) > self.max_length:
            prompt = self._shorten(row, self.max_length - len(response))
        return Example((*prompt, *response), len(prompt))

    def encode_all(self, rows: Sequence[Row]) -> list[Example]:
        """Encode rows in order."""
        return [self.encode(row) for row in rows]

    def _shorten(self, row: Row, room: int) -> list[int]:
        self.cut += 1
        context = self.tokenizer(row.context, add_special_tokens=False)["input_ids"]
        keep = len(context)
        while True:
            prompt = self.prompt(row.instruction, self.tokenizer.decode(context[:keep]))
            if len(prompt) <= room:
                return prompt
            if not keep:
                raise DataError(
                    f"a row of {len(prompt)} prompt tokens with {self.max_length - room} response tokens",
                    f"training.max_length = {self.max_length} must hold instruction and response",
                    "raise training.max_length or shorten the row",
                )
            # Cutting tokens can merge or split others at the seam, so measure again rather than trust the count.
            keep = max(0, keep - max(1, len(prompt) - room))


def _set_pad_token(tokenizer: Any) -> None:
    """Make sure that padding and EOS differ: where they are one token, masking padding hides EOS."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [tokenizer.unk_token, *tokenizer.all_special_tokens]
    others = [t for t in special if t is not None and t != tokenizer.eos_token]
    if not others:
        raise ConfigError(
            "the tokenizer's pad token",
            "it must differ from EOS, and no other special token exists",
            "add one",
        )
    tokenizer.pad_token = others[0]
