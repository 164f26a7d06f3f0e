"""The units that ROUGE-L counts: words of any script, for English those of rouge-score's tokenizer.

A *word* is a run of letters, digits and their combining marks; signs, punctuation and emoji separate words. In
scripts without spaces between words, each character with its marks (an extended grapheme cluster) is a unit. Pure
ASCII text gives exactly rouge-score's default tokens, with Porter's stems.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import regex

TOKENIZER = "unicode-words-1"
"""Version of the rules below; it changes whenever a text would give other tokens."""

_UNSPACED = (
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi"),
    *("Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet"),
    *("Javanese", "Balinese"),
)
"""Scripts written without spaces between words; their digits form numbers as in any script."""
_ALONE = "[[" + "".join(rf"\p{{Script_Extensions={script}}}" for script in _UNSPACED) + r"]&&[\p{L}\p{N}]--\p{Nd}]"
_PART = rf"[[\p{{L}}\p{{N}}]--{_ALONE}]"
_TOKEN = regex.compile(rf"(?V1)(?={_ALONE})\X[\p{{Mn}}\p{{Mc}}]*|{_PART}(?:{_PART}|[\p{{Mn}}\p{{Mc}}])*")
_INVISIBLE = regex.compile(r"(?V1)[\p{Default_Ignorable_Code_Point}--\u200b]+")
"""Soft hyphens, joiners, direction and variation marks; not the zero-width space, which separates words."""
_OF_A_WIDTH = regex.compile(r"\p{Block=Halfwidth_and_Fullwidth_Forms}+")


def folded(text: str) -> str:
    """Return text as it is compared: canonical caseless matching (Unicode D145), composed.

    Invisible characters are removed, full and half widths are unified, and the Turkish dotted capital I becomes i.
    """
    text = _INVISIBLE.sub("", _OF_A_WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text))
    text = unicodedata.normalize("NFD", text).casefold().replace("i\u0307", "i")
    return unicodedata.normalize("NFC", text)


class UnicodeWords:
    """A tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """Return a text's words; ASCII words as rouge-score's tokenizer returns them, stemmed."""
        words = _TOKEN.findall(folded(text))
        return [token for word in words for token in (_english().tokenize(word) if word.isascii() else [word])]


@cache
def _english() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
