"""Facts about silos' rows that show none of them: counts, lengths, duplicates, scripts, and how silos differ.

Category names and column names are the only texts of a silo's files in these facts. Rows of different silos are
never compared by content, only by their labels and lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy
import regex

from flexperts.config.data import DataConfig
from flexperts.config.names import SCRIPTS
from flexperts.data.clients import Clients, sources_of
from flexperts.data.formats import PASSAGE, layout_of, possible_columns
from flexperts.data.holdout import passage_key
from flexperts.data.prompts import Example
from flexperts.data.rows import ClientRows, Row
from flexperts.data.sources import open_table
from flexperts.errors import DataError

Side = Literal["train", "test", "validation"]
SIDES: tuple[Side, ...] = ("train", "test", "validation")
_NO_CONTENT = ("category", "passage", "where")
"""Fields of a row that are neither read nor learned."""
_SAYS = regex.compile(r"[\p{L}\p{N}]")
_OTHER = "other"


class Lengths(NamedTuple):
    """Lengths of the rows of one split, in their order.

    Args:
        tokens: Tokens of each row; of a pair, with the longer answer.
        answers: Tokens of each answer, or chosen answer, without its end token.
        cut: Number of rows that were cut to the longest length.
    """

    tokens: tuple[int, ...]
    answers: tuple[int, ...]
    cut: int


def lengths_of(examples: Sequence[Example]) -> Lengths:
    """Return the lengths of encoded rows."""
    cut = sum(example.cut for example in examples)
    return Lengths(tuple(e.length for e in examples), tuple(e.response_length - 1 for e in examples), cut)


def silo_facts(rows: ClientRows, lengths: Mapping[Side, Lengths], limit: int) -> dict[str, Any]:
    """Return the facts about one silo's rows.

    Args:
        rows: The rows.
        lengths: Their lengths.
        limit: The longest answer that is generated, in tokens.

    Returns:
        ``rows``, ``duplicates`` and ``longer`` (answers beyond the limit) by split; ``tokens`` and
        ``answer_tokens`` as p50, p95 and max; ``cut``; ``also_in_train`` (test and validation rows);
        ``empty`` (answers without a letter or digit); ``scripts`` (shares of the letters, the largest first);
        ``categories`` (counts of train rows).
    """
    sides = {side: getattr(rows, side) for side in SIDES}
    keys = {side: [_content(row) for row in its] for side, its in sides.items()}
    trained = {*keys["train"]}
    everything = [row for its in sides.values() for row in its]
    return {
        "rows": {side: len(its) for side, its in sides.items()},
        "tokens": spread(chain.from_iterable(its.tokens for its in lengths.values())),
        "answer_tokens": spread(chain.from_iterable(its.answers for its in lengths.values())),
        "cut": sum(its.cut for its in lengths.values()),
        "longer": {side: sum(tokens > limit for tokens in lengths[side].answers) for side in SIDES},
        "duplicates": {side: len(its) - len({*its}) for side, its in keys.items()},
        "also_in_train": sum(key in trained for side in SIDES[1:] for key in keys[side]),
        "empty": sum(_SAYS.search(row.response) is None for row in everything),
        "scripts": scripts(f"{row.instruction}{row.context}{row.response}{row.rejected}" for row in everything),
        "categories": dict(sorted(Counter(row.category for row in rows.train).items())),
    }


def short_line(clients: Clients, lengths: Mapping[str, Mapping[Side, Lengths]], longest: int) -> str:
    """Return the most important facts about all silos' rows in one line.

    Args:
        clients: The rows.
        lengths: Client -> split -> lengths.
        longest: The longest row that is allowed, in tokens.
    """
    every = [its for name in clients for its in lengths[name].values()]
    tokens = spread(chain.from_iterable(its.tokens for its in every))
    twice = sum(len(its.train) - len({*map(_content, its.train)}) for its in clients.values())
    found = [f"{cut} of them cut" if (cut := sum(its.cut for its in every)) else ""]
    found += [f"{twice} train rows repeat another of their silo" if twice else ""]
    told = "; ".join(text for text in found if text)
    return f"tokens of a row: {_spread_text(tokens)}, of at most {longest}{f'; {told}' if told else ''}"


def spread(values: Iterable[int]) -> dict[str, int]:
    """Return median, 95th percentile and maximum of whole numbers, each one of them; zeros where there are none."""
    found = numpy.fromiter(values, dtype=numpy.int64)
    if not found.size:
        return {"p50": 0, "p95": 0, "max": 0}
    middle, high = numpy.quantile(found, (0.5, 0.95), method="inverted_cdf")
    return {"p50": int(middle), "p95": int(high), "max": int(found.max())}


def _spread_text(its: Mapping[str, int]) -> str:
    return f"{its['p50']} (p50), {its['p95']} (p95), {its['max']} (max)"


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Return the share of each Unicode script among the letters of texts, the largest first."""
    rest = regex.sub(r"\P{L}+", "", "".join(texts))
    total, counts = len(rest), Counter[str]()
    for script in (name for names in SCRIPTS for name in names.split("+")):
        if not rest:
            break
        left = regex.sub(rf"\p{{Script={script}}}+", "", rest)
        counts[script] += len(rest) - len(left)
        rest = left
    counts[_OTHER] += len(rest)
    return {script: round(count / total, 4) for script, count in counts.most_common() if count}


def differences(clients: Clients, lengths: Mapping[str, Mapping[Side, Lengths]]) -> dict[str, dict[str, Any]]:
    """Return how each silo's train rows differ from those of all other silos together.

    Both numbers are between 0 (the same distribution) and 1 (nothing in common).

    Args:
        clients: The rows of two silos or more.
        lengths: Client -> split -> lengths.

    Returns:
        Client -> ``labels``, the total variation distance of the shares of categories (None where no silo has
        any), ``tokens`` and ``answer_tokens``, the Kolmogorov-Smirnov distance of the lengths.
    """
    labels = {name: Counter(row.category for row in its.train) for name, its in clients.items()}
    is_labelled = any({*counts} - {""} for counts in labels.values())
    together: Counter[str] = Counter()
    for counts in labels.values():
        together.update(counts)
    found: dict[str, dict[str, Any]] = {}
    ranks = {kind: _ranks(lengths, clients, kind) for kind in ("tokens", "answers")}
    for name in clients:
        distance = _total_variation(labels[name], together - labels[name]) if is_labelled else None
        found[name] = {"labels": distance, "tokens": ranks["tokens"][name], "answer_tokens": ranks["answers"][name]}
    return found


def _total_variation(one: Counter[str], others: Counter[str]) -> float:
    """Return half the sum of the differences of two distributions' shares."""
    n, m = one.total(), others.total()
    return round(sum(abs(one[label] / n - others[label] / m) for label in one | others) / 2, 3)


def _ranks(lengths: Mapping[str, Mapping[Side, Lengths]], clients: Clients, kind: str) -> dict[str, float]:
    """Return each silo's largest difference of cumulative shares to all other silos, by lengths of train rows."""
    own = {name: numpy.sort(getattr(lengths[name]["train"], kind)) for name in clients}
    every = numpy.sort(numpy.concatenate([*own.values()]))
    points = numpy.unique(every)
    below = numpy.searchsorted(every, points, side="right")
    found = {}
    for name, its in own.items():
        mine = numpy.searchsorted(its, points, side="right")
        rest = len(every) - len(its)
        found[name] = round(float(numpy.abs(mine / len(its) - (below - mine) / rest).max()), 3)
    return found


def file_facts(config: DataConfig) -> list[dict[str, Any]]:
    """Return what is read of every file: ``silo`` (None for a pooled file), ``split``, ``source``, ``format``.

    ``columns`` is field -> column, and ``unused`` has the other columns. Files that cannot be read have none of
    these.
    """
    return [
        {"silo": name, "split": split, "source": source}
        | _columns(source, config if name is None else config.of_client(name), split)
        for name, split, source in sources_of(config)
    ]


def _columns(source: str, config: DataConfig, split: str) -> dict[str, Any]:
    own = {config.partition.column} if config.partition and config.partition.by != "iid" else set()
    try:
        table = open_table(source, possible_columns(config.columns), split)
        layout = layout_of(table.source, table.columns, config.columns, config.format)
    except DataError:  # it is reported where the rows are read
        return {}
    used = {PASSAGE, *own, *layout.fields.values()}
    unused = [name for name in table.columns if name not in used]
    return {"format": layout.format, "columns": layout.fields, "unused": unused}


def parts(example: Example) -> list[tuple[bool, tuple[int, ...]]]:
    """Return an example's tokens in order, in parts: whether the loss is computed on a part, and its tokens."""
    found, at = [], 0
    for start, end in example.spans:
        found += [(False, example.input_ids[at:start]), (True, example.input_ids[start:end])]
        at = end
    return [(is_trained, ids) for is_trained, ids in [*found, (False, example.input_ids[at:])] if ids]


def _content(row: Row) -> tuple[str, ...]:
    """Return a row's texts for comparison, as a reader compares them; see ``passage_key``."""
    names = (field.name for field in fields(row) if field.name not in _NO_CONTENT)
    return tuple(passage_key(str(getattr(row, name))) for name in names)
