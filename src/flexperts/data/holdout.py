"""Held-out rows: whole passages, compared as people read them, and never in both splits.

Two passages count as equal if they differ only in case, white space, line ends, invisible characters, kinds of
quotes and dashes, or Unicode form (NFKC). A context that all rows of a client share, or that means "no context"
("N/A"), does not identify a passage: the instruction is used instead. The rows themselves are not changed.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import regex

from flexperts.data.records import Say, unsaid
from flexperts.data.rows import ClientRows, Row
from flexperts.errors import DataError
from flexperts.seeding import derive_seed

OWN_COLUMN = "if the context does not identify a passage, add a column `passage` that names each row's passage"
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}|[^\P{Cc}\s]")
_QUOTES, _DASHES = regex.compile(r"\p{Quotation_Mark}+"), regex.compile(r"[\p{Dash_Punctuation}\u2212]")
_NONE = regex.compile(
    r"|na?|n a|none|null|nil|nan|no ?(context|input|passage|text|data|value)|not (applicable|available|given)"
    r"|empty|undefined|unknown"
)
_LONGEST_NONE = 100
"""Characters."""
_PAIRS = 3
"""How many shared passages a message locates."""


def hold_out(
    rows: Sequence[Row],
    fraction: float,
    seed: int,
    where: str,
    side: Literal["test", "validation"] = "test",
    *,
    count: int | None = None,
    whole: Sequence[Row] = (),
    say: Say = unsaid,
) -> ClientRows:
    """Divide rows by passage: all rows of a passage go to one side, chosen by a hash of the passage.

    Args:
        rows: The rows.
        fraction: Share of the passages that is held out.
        seed: Seed of the choice.
        where: The client, for messages.
        side: What the rows are held out for; they are returned as ``test``.
        count: Number of rows to hold out in place of a share; whole passages can have a few more.
        whole: All rows of the client, if ``rows`` are only some of them.
        say: Called with one line per surprising finding.
    """
    texts = identities(rows, whole or rows, where, say)
    keys = [passage_key(text) for text in texts]
    passages: dict[str, str] = {}
    for key, text in zip(keys, texts, strict=True):
        passages[key] = min(text, passages.get(key, text))  # one of several spellings, independent of row order
    order = sorted(passages, key=lambda key: derive_seed(seed, f"{side} split", passages[key]))
    sizes = Counter(keys)
    before = accumulate((sizes[key] for key in order), initial=0)  # rows of the passages before each one
    taken = round(fraction * len(order)) if count is None else sum(rows < count for rows in before)
    held_out = set(order[:taken])
    train = tuple(row for row, key in zip(rows, keys, strict=True) if key not in held_out)
    test = tuple(row for row, key in zip(rows, keys, strict=True) if key in held_out)
    if not train or not test:
        what = f"fraction = {fraction}" if count is None else f"rows = {count}"
        raise DataError(
            f"{where}: {len(order)} passages with {side}_{what}",
            f"train and {side} need at least one passage each",
            f"add passages, change the {what.partition(' ')[0]}, or give a test file; {OWN_COLUMN}",
        )
    say_uneven(rows, keys, where, say)
    return ClientRows(train, test)


def check_disjoint(rows: ClientRows, where: str, *, say: Say = unsaid) -> ClientRows:
    """Return ``rows`` unless train and test share a passage.

    Args:
        rows: A client's rows.
        where: The client, for messages.
        say: Called with one line per surprising finding.
    """
    both = (*rows.train, *rows.test)
    keys = [passage_key(text) for text in identities(both, both, where, say)]
    trained = _places(rows.train, keys[: len(rows.train)], "train")
    tested = _places(rows.test, keys[len(rows.train) :], "test")
    if shared := [key for key in tested if key in trained]:
        pairs = "; ".join(f"{tested[key]} and {trained[key]}" for key in shared[:_PAIRS])
        raise DataError(
            f"{where}: {len(shared)} passages are in train and in test, such as {pairs}",
            "a test passage must not be in train, not even with other case, white space, quotes or Unicode form",
            f"split by passage, or give one file and data.test_fraction; {OWN_COLUMN}",
        )
    return rows


def _places(rows: Sequence[Row], keys: Sequence[str], side: str) -> dict[str, str]:
    """Return each passage's first place."""
    places: dict[str, str] = {}
    for number, (row, key) in enumerate(zip(rows, keys, strict=True), 1):
        places.setdefault(key, row.where or f"{side} row {number}")
    return places


def passage_key(text: str) -> str:
    """Return a normal form of a passage: equal for passages that a reader would call the same."""
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    folded = _QUOTES.sub("'", _DASHES.sub("-", unicodedata.normalize("NFKC", folded)))
    return " ".join(folded.split())


def identities(rows: Sequence[Row], whole: Sequence[Row], where: str, say: Say = unsaid) -> list[str]:
    """Return the text by which each row is compared: its passage, or its instruction where there is no passage.

    Args:
        rows: The rows.
        whole: All rows of the client; they show whether a context identifies a passage.
        where: The client, for messages.
        say: Called with a line where contexts are not used as passages.
    """
    named = [row for row in whole if _by_context(row)]
    if len(named) == len(whole) > 1 and len({passage_key(row.context) for row in whole}) == 1:
        say(
            f"{where}: the context is the same in all {len(whole)} rows{_from(whole[0])}, so it does not identify "
            f"a passage: the instruction is used instead; {OWN_COLUMN}"
        )
        return [row.instruction for row in rows]
    if empty := [row for row in named if _stands_for_none(row.context)]:
        say(
            f'{where}: the context of {len(empty)} of {len(whole)} rows{_from(empty[0])} means "no context": '
            "the instruction is used instead"
        )
    none = [_by_context(row) and _stands_for_none(row.context) for row in rows]
    return [row.instruction if is_none else row.passage for row, is_none in zip(rows, none, strict=True)]


def say_uneven(rows: Sequence[Row], keys: Sequence[str], where: str, say: Say) -> None:
    """Report a passage that more than half of the rows share: all of them are in one split."""
    key, count = Counter(keys).most_common(1)[0]
    if count > max(2, len(rows) / 2):
        first = _from(rows[keys.index(key)])
        say(f"{where}: {count} of {len(rows)} rows{first} share one passage and are in one split; {OWN_COLUMN}")


def _from(row: Row) -> str:
    """Return the place of the first row that a line is about, in brackets."""
    return f" (from {row.where})" if row.where else ""


def _by_context(row: Row) -> bool:
    """Return whether the row's passage is its context."""
    return bool(row.context) and row.passage == row.context


def _stands_for_none(context: str) -> bool:
    if len(context) > _LONGEST_NONE:
        return False
    return _NONE.fullmatch(" ".join(regex.findall(r"\w+", passage_key(context)))) is not None
