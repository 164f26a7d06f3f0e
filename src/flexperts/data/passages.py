"""Which rows belong together when test rows are held out: passages, compared as people read them.

Two passages are one if they differ in nothing but case, blanks, ends of lines, invisible characters, kinds of
quotes and dashes, or how Unicode writes the same text (NFKC). A context that all rows of a client have, or that
stands for none ("N/A"), is no passage: the instruction serves in its place. Rows stay as they were read.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

from flexperts.data.records import Say, unsaid
from flexperts.data.rows import Row

OWN_COLUMN = "where a context is no passage, give the rows a column `passage` that says which is whose"
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}|[^\P{Cc}\s]")
_QUOTES, _DASHES = regex.compile(r"\p{Quotation_Mark}+"), regex.compile(r"[\p{Dash_Punctuation}\u2212]")
_NONE = regex.compile(
    r"|na?|n a|none|null|nil|nan|no ?(context|input|passage|text|data|value)|not (applicable|available|given)"
    r"|empty|undefined|unknown"
)
_LONGEST_NONE = 100
"""Characters."""


def passage_key(text: str) -> str:
    """Return what two passages have in common if they differ in nothing that a reader would call a difference."""
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    folded = _QUOTES.sub("'", _DASHES.sub("-", unicodedata.normalize("NFKC", folded)))
    return " ".join(folded.split())


def identities(rows: Sequence[Row], whole: Sequence[Row], where: str, say: Say = unsaid) -> list[str]:
    """Return the text by which each row is compared: its passage, or its instruction where its context is none.

    Args:
        rows: The rows.
        whole: All rows of the client, which show whether a context is a passage.
        where: Whose rows they are.
        say: Gets a line where a context is taken for none.
    """
    named = [row for row in whole if _by_context(row)]
    if len(named) == len(whole) > 1 and len({passage_key(row.context) for row in whole}) == 1:
        say(
            f"{where}: the context is the same in all {len(whole)} rows{_from(whole[0])}, so it is no passage: "
            f"their instruction serves instead; {OWN_COLUMN}"
        )
        return [row.instruction for row in rows]
    if empty := [row for row in named if _stands_for_none(row.context)]:
        say(
            f"{where}: the context of {len(empty)} of {len(whole)} rows{_from(empty[0])} stands for none: "
            "their instruction serves instead"
        )
    none = [_by_context(row) and _stands_for_none(row.context) for row in rows]
    return [row.instruction if is_none else row.passage for row, is_none in zip(rows, none, strict=True)]


def say_uneven(rows: Sequence[Row], keys: Sequence[str], where: str, say: Say) -> None:
    """Say it where one passage stands in most rows, which therefore all lie on one side."""
    key, count = Counter(keys).most_common(1)[0]
    if count > max(2, len(rows) / 2):
        first = _from(rows[keys.index(key)])
        say(f"{where}: {count} of {len(rows)} rows{first} have one passage and lie on one side; {OWN_COLUMN}")


def _from(row: Row) -> str:
    """Return where the first of the rows stands that a line is about."""
    return f" (from {row.where})" if row.where else ""


def _by_context(row: Row) -> bool:
    """Tell whether the context is what the row has for a passage."""
    return bool(row.context) and row.passage == row.context


def _stands_for_none(context: str) -> bool:
    if len(context) > _LONGEST_NONE:
        return False
    return _NONE.fullmatch(" ".join(regex.findall(r"\w+", passage_key(context)))) is not None
