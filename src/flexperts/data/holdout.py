"""Which rows are held out: whole passages, compared as people read them, and never on both sides.

Two passages are one if they differ in nothing but case, blanks, ends of lines, invisible characters, kinds of
quotes and dashes, or how Unicode writes the same text (NFKC). A context that all rows of a client have, or that
stands for none ("N/A"), is no passage: the instruction serves in its place. Rows stay as they were read.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import regex

from flexperts.data.records import Say, unsaid
from flexperts.data.rows import ClientRows, Row
from flexperts.errors import DataError
from flexperts.seeding import derive_seed

OWN_COLUMN = "where a context is no passage, give the rows a column `passage` that says which is whose"
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}|[^\P{Cc}\s]")
_QUOTES, _DASHES = regex.compile(r"\p{Quotation_Mark}+"), regex.compile(r"[\p{Dash_Punctuation}\u2212]")
_NONE = regex.compile(
    r"|na?|n a|none|null|nil|nan|no ?(context|input|passage|text|data|value)|not (applicable|available|given)"
    r"|empty|undefined|unknown"
)
_LONGEST_NONE = 100
"""Characters."""
_PAIRS = 3
"""Shared passages that a message tells the places of."""


def split_rows(
    rows: Sequence[Row],
    fraction: float,
    seed: int,
    where: str,
    side: Literal["test", "validation"] = "test",
    *,
    whole: Sequence[Row] = (),
    say: Say = unsaid,
) -> ClientRows:
    """Divide rows by passage: all rows of a passage land on one side, chosen by a hash of the passage.

    Args:
        rows: The rows.
        fraction: Share of the passages that is held out.
        seed: Seed of the choice.
        where: Whose rows they are, for messages.
        side: What the rows are held out for; they are the returned ``test``.
        whole: All rows of the client, where these are not all.
        say: Gets what surprises, in lines.

    Raises:
        DataError: One side would be empty.
    """
    texts = identities(rows, whole or rows, where, say)
    keys = [passage_key(text) for text in texts]
    passages: dict[str, str] = {}
    for key, text in zip(keys, texts, strict=True):
        passages[key] = min(text, passages.get(key, text))  # of several spellings one, whatever the rows' order
    order = sorted(passages, key=lambda key: derive_seed(seed, f"{side} split", passages[key]))
    held_out = set(order[: round(fraction * len(order))])
    train = tuple(row for row, key in zip(rows, keys, strict=True) if key not in held_out)
    test = tuple(row for row, key in zip(rows, keys, strict=True) if key in held_out)
    if not train or not test:
        raise DataError(
            f"{where}: {len(order)} passages with {side}_fraction = {fraction}",
            f"train and {side} need at least one passage each",
            f"add passages, take another share, or give a test file; {OWN_COLUMN}",
        )
    say_uneven(rows, keys, where, say)
    return ClientRows(train, test)


def check_disjoint(rows: ClientRows, where: str, *, say: Say = unsaid) -> ClientRows:
    """Return ``rows`` unless a test passage was trained on.

    Args:
        rows: A client's rows.
        where: Whose they are, for messages.
        say: Gets what surprises, in lines.

    Raises:
        DataError: Train and test share a passage; rows are named and no passage is quoted.
    """
    both = (*rows.train, *rows.test)
    keys = [passage_key(text) for text in identities(both, both, where, say)]
    trained = _places(rows.train, keys[: len(rows.train)], "train")
    tested = _places(rows.test, keys[len(rows.train) :], "test")
    if shared := [key for key in tested if key in trained]:
        pairs = "; ".join(f"{tested[key]} and {trained[key]}" for key in shared[:_PAIRS])
        raise DataError(
            f"{where}: {len(shared)} passages stand in train and in test, such as {pairs}",
            "a test passage must never be trained on, in no other case, blanks, quotes or Unicode form either",
            f"split by passage, or give one file and data.test_fraction; {OWN_COLUMN}",
        )
    return rows


def _places(rows: Sequence[Row], keys: Sequence[str], side: str) -> dict[str, str]:
    """Return where each passage stands first."""
    places: dict[str, str] = {}
    for number, (row, key) in enumerate(zip(rows, keys, strict=True), 1):
        places.setdefault(key, row.where or f"{side} row {number}")
    return places


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
