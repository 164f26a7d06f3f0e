"""Names of clients: one rule for all sources: folders, keys, ids, a silo's file, messages.

A name is part of file names and tells people whose model answers. So it is in NFC, its letters are from scripts
that are written together ("highly restrictive" in UTS 39), and no two names of a run look alike: they differ by
more than case and letters that look like a-z (by the confusables of UTS 39).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache

import regex

from flexperts.errors import DataError, shown

_LONGEST = 200
"""Most bytes of a client's name: with prefix and ending it is a file name, and most systems allow 255."""
SCRIPTS = (
    "Latin+Han+Hiragana+Katakana", "Latin+Han+Bopomofo", "Latin+Han+Hangul", "Adlam", "Arabic", "Armenian",
    "Balinese", "Bengali", "Canadian_Aboriginal", "Cham", "Cherokee", "Cyrillic", "Devanagari", "Ethiopic",
    "Georgian", "Greek", "Gujarati", "Gurmukhi", "Hebrew", "Javanese", "Kannada", "Khmer", "Lao", "Lisu",
    "Malayalam", "Meetei_Mayek", "Mongolian", "Myanmar", "New_Tai_Lue", "Nko", "Ol_Chiki", "Oriya", "Osage",
    "Sinhala", "Sundanese", "Syriac", "Tai_Le", "Tamil", "Telugu", "Thaana", "Thai", "Tibetan", "Tifinagh",
    "Vai", "Yi",
)  # fmt: skip
"""Scripts; those joined by + are written together."""


def _of_any(scripts: str) -> str:
    """Return the pattern of characters of some scripts, or of all."""
    return "".join(rf"\p{{scx={script}}}" for script in ("Common", "Inherited", *scripts.split("+")))


_ONE_WRITING = regex.compile("|".join(f"[{_of_any(scripts)}]*" for scripts in SCRIPTS))
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")
_NO_FIRST = regex.compile(r"[.\p{M}]")
_NOWHERE = regex.compile(r"[^\p{L}\p{M}\p{Nd}_.-]|\p{Default_Ignorable_Code_Point}")
_COMPOSED = "ำຳໜໝև"
"""Letters of Thai, Lao and Armenian that Unicode lists as variants, but that have no other spelling in use."""


def normal(name: str) -> str:
    """Return a name in NFC, the form in which it is stored and looked up."""
    return unicodedata.normalize("NFC", name)


def one_label(text: str) -> str:
    """Return a category or id for comparison: differences in white space and Unicode form do not count."""
    return " ".join(normal(_INVISIBLE.sub("", text)).split())


def client_name(text: str) -> str:
    """Return a client's name in NFC, or refuse it."""
    name = normal(text)
    if (size := len(name.encode(errors="replace"))) > _LONGEST:  # file systems count bytes
        raise DataError(
            f"client {name[:40]!r}... of {size} bytes", f"a name has at most {_LONGEST} bytes", "rename it"
        )
    if not name or (strange := _strange(name)) is not None:
        at = f"; this one holds {_told(strange)}" if name and strange else ""
        rule = f"a client's name is letters, digits, '-', '_', '.', and begins with no '.'{at}"
        raise DataError(f"client {shown(name)}", rule, "rename it")
    if (other := _foreign(name)) is not None:
        rule = f"a name's letters and digits are of one script, and {_told(other)} is of another than those before"
        raise DataError(f"client {shown(name)}", rule, "write it in one script, look-alikes too")
    return name


def client_names(texts: Iterable[str]) -> dict[str, str]:
    """Return the client name for each text; refuse two that look alike."""
    names: dict[str, str] = {}
    readings: dict[str, str] = {}
    for text in texts:
        names[text] = client_name(text)
        if (other := alike(names[text], readings)) is not None:
            raise DataError(
                f"clients {other!a} and {text!a}", "two clients of a run must not read alike", "rename one"
            )
        readings |= dict.fromkeys(skeletons(names[text]), text)
    return names


def readings_of(names: Iterable[str]) -> dict[str, str]:
    """Return a mapping from each look to the name that has it."""
    return {look: name for name in names for look in skeletons(name)}


def alike(name: str, readings: Mapping[str, str]) -> str | None:
    """Return the known name that looks like this one, or None."""
    return next((readings[look] for look in skeletons(name) if look in readings), None)


@lru_cache(1 << 14)
def skeletons(name: str) -> tuple[str, str]:
    """Return how a name looks to people: without case, and with look-alikes of a-z replaced by these."""
    letters = unicodedata.normalize("NFD", name).translate(_latin())
    return name.casefold(), unicodedata.normalize("NFC", letters).casefold()


def file_safe(text: str) -> str:
    """Return an id as a client's name: every character that a name cannot have becomes '-'."""
    safe = "".join("-" if _is_nowhere(c) else c for c in normal(text))
    return f"-{safe[1:]}" if _NO_FIRST.match(safe) else safe


def _strange(name: str) -> str | None:
    """Return the first character that a name cannot have at its place."""
    return name[0] if _NO_FIRST.match(name) else next(filter(_is_nowhere, name), None)


def _is_nowhere(character: str) -> bool:
    """Return whether no name can have a character: no letter or digit, invisible, or a variant of another."""
    variant = unicodedata.decomposition(character).startswith("<") and character not in _COMPOSED
    # A letter newer than Python's own tables has no known forms, so two silos could read it differently.
    return variant or not character.isprintable() or _NOWHERE.match(character) is not None


def _foreign(name: str) -> str | None:
    """Return the first letter or digit whose script is not written together with those before it."""
    zeros = {ord(c) - unicodedata.decimal(c): c for c in reversed(name) if c.isdecimal()}
    if len(zeros) > 1:
        return max(zeros.values(), key=name.index)
    if _ONE_WRITING.fullmatch(name):
        return None
    return next(name[end - 1] for end in range(1, len(name) + 1) if not _ONE_WRITING.fullmatch(name[:end]))


def _told(character: str) -> str:
    return f"{character!a} ({unicodedata.name(character, 'unnamed')})"


@lru_cache(1)
def _latin() -> dict[int, str]:
    """Return the letters and digits that look like one of a-z, A-Z, 0-9, with that one."""
    from confusable_homoglyphs.confusables import confusables_data  # a slow import

    found = ((letter, alikes[0]["c"]) for letter, alikes in confusables_data.items())
    return {
        ord(c): like for c, like in found if len(c) == 1 and not c.isascii() and like.isascii() and like.isalnum()
    }
