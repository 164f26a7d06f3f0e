"""Outside texts as tokens: what rows and users write stays text, and never becomes a control token.

Control tokens are what a template or a tokenizer writes around texts: special tokens, and added tokens that occur
in the chat template, such as ``<|im_end|>`` or ``<think>``. transformers can encode a rendered chat in which
control tokens from outside are marked. Here they are marked in texts of every kind, and the resulting tokens are
checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from flexperts.errors import ConfigError, DataError

_MARKS = re.compile("[\U000f0000\U000f0001]")
"""The characters that transformers puts around a marked token."""


class TokenEncoder:
    """Encoder of texts for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        vocabulary: Rows of the base's embedding; None where unknown.
        written: Text that a template writes; added tokens in it are control tokens.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None, written: str = "") -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
        # Some tokenizers have added tokens for runs of white space: these are text.
        self._controls: dict[str, int] = {
            content: number
            for content, (number, special) in added.items()
            if special or (content in written and not content.isspace())
        }
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._forged = set(self._controls.values()) - {tokenizer.unk_token_id}

    def mark(self, texts: Any) -> Any:
        """Return a text, or messages, with the control tokens in them marked as text.

        Raises:
            DataError: A text has a character that marks; transformers would leave it out.
        """
        if found := _MARKS.search(json.dumps(texts, ensure_ascii=False, default=str)):
            raise DataError(
                f"the private-use character U+{ord(found[0]):X} in a text",
                "this character marks control tokens while texts are encoded, so it would be lost",
                "remove U+F0000 and U+F0001 from the text",
            )
        return mark_control_tokens(texts, self._pattern)

    def controls_in(self, text: str) -> list[re.Match[str]]:
        """Return the matches of control tokens in a text."""
        return list(self._pattern.finditer(text))

    def id_of(self, control: str) -> int:
        """Return a control token's id."""
        return self._controls[control]

    def plain(self, text: str, *, beginning: bool = True) -> list[int]:
        """Return the tokens of a text from outside.

        Args:
            text: The text.
            beginning: Whether to start with ``self.beginning``. Tokens that some tokenizers append are never added.
        """
        return [*(self.beginning if beginning else ()), *self.encode(self.mark(text))]

    def encode(self, marked: str) -> list[int]:
        """Return the tokens of a text; marked control tokens in it become plain characters."""
        plain = not _MARKS.search(marked)
        try:
            ids = self._ids(marked) if plain else encode_marked_chat(self.tokenizer, marked)
        except ValueError as error:
            raise self._unwritable() from error
        pieces = [marked] if plain else self._unmarked(marked)
        written = sum(len(self._pattern.findall(piece)) for piece in pieces)
        if sum(number in self._forged for number in ids) > written:
            raise self._unwritable()
        return self.checked(ids)

    def encode_after(self, before: Sequence[int], text_before: str, marked: str) -> list[int]:
        """Return the tokens of a text that follows another text.

        Args:
            before: The tokens of the first text.
            text_before: The first text, marked.
            marked: The text that follows, marked.
        """
        whole = self.encode(text_before + marked)
        if whole[: len(before)] == list(before):
            return whole[len(before) :]
        # The tokenizer merges the last token before with the first one after. Generated tokens follow the unmerged
        # token, so the second text is encoded alone: after a new line, where no tokenizer adds the space that some
        # put in front of a text.
        line = self.encode("\n")
        after = self.encode(f"\n{marked}")
        return after[len(line) :] if after[: len(line)] == line else self.encode(marked)

    @cached_property
    def beginning(self) -> list[int]:
        """The tokens that the tokenizer puts in front of a text by itself, such as BOS."""
        plain, whole = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        return whole[: starts[0]] if starts else []

    def checked(self, ids: list[int]) -> list[int]:
        """Return ``ids`` if the base has an embedding for each."""
        if self.vocabulary is not None and ids and (largest := max(ids)) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            name = repr(token) if largest in self.tokenizer.added_tokens_decoder else "a token"
            raise DataError(
                f"{name} has the id {largest}",
                f"the base has {self.vocabulary} embedding rows",
                "use the tokenizer that belongs to the base, or resize the base's embeddings and save it again",
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _unmarked(self, marked: str) -> list[str]:
        """Return the pieces of a text outside of marks."""
        return re.split(f"\U000f0000(?:{self._pattern.pattern})\U000f0001|{_MARKS.pattern}", marked)

    def _unwritable(self) -> DataError:
        return DataError(
            "a control token of the tokenizer in a text",
            "this tokenizer cannot encode it as plain characters",
            f"remove it from the text (control tokens: {', '.join(list(self._controls)[:8])})",
        )


def set_pad_token(tokenizer: Any, vocabulary: int | None = None) -> None:
    """Set a pad token that has an embedding and is not EOS: masking the padding would also mask EOS."""

    def can_pad(token: str | None) -> bool:
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        return number is not None and number != tokenizer.eos_token_id and (not vocabulary or number < vocabulary)

    if can_pad(tokenizer.pad_token):
        return
    others = [token for token in (tokenizer.unk_token, *tokenizer.all_special_tokens) if can_pad(token)]
    if not others:
        raise ConfigError(
            "the tokenizer's pad token",
            "it must differ from EOS and have an embedding, and no special token does",
            "add a pad token to the tokenizer and resize the base's embeddings",
        )
    tokenizer.pad_token = others[0]
