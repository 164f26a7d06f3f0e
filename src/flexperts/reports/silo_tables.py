"""Tables over silos: scores by silo, measures that no mean shows, and how far the silos are apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flexperts.reports.cells import MISSING, Cell, Column, Table, bounded, mark_best, number, spread, words
from flexperts.reports.notes import client_note, counts
from flexperts.reports.reading import (
    LOWER_IS_BETTER,
    METRICS,
    REWARDS,
    STATES,
    Comparison,
    Entry,
    mean,
    ordered,
    over_silos,
    own,
    own_state_words,
    unranked,
)
from flexperts.reports.score_tables import DIGITS, WHO, own_state, place_words

_MOST_COLUMNS = 6
"""Most silos that are columns: more scores with their spread are too wide for a page."""


def client_table(comparison: Comparison, metric: str) -> Table:
    """Return every client's score of every entry's own state on that client's own rows.

    With few clients a row is an entry, and scores have their spread over seeds; with more a row is a client.
    """
    clients: Sequence[str] = comparison["clients"]
    if len(clients) > _MOST_COLUMNS:
        return silo_table(comparison, metric)
    digits, entries = DIGITS[metric], ordered(comparison)
    rows = []
    for entry in entries:
        found = own(entry, "own", metric)
        cells = [spread(((found or {}).get("clients") or {}).get(c), digits) for c in clients]
        rows.append((words(entry["name"]), own_state(entry), *cells, spread(found, digits)))
    for column in range(2, len(clients) + 3):
        rows = mark_best(rows, column, lowest=metric in LOWER_IS_BETTER, left_out=unranked(entries, metric))
    group = place_words(comparison, own_state_words(comparison), "own")
    header = (*WHO, *(Column(c, group) for c in clients), Column("mean", group))
    return _by_client(comparison, metric, "column", header, rows)


def silo_table(comparison: Comparison, metric: str) -> Table:
    """Return the same scores, means over seeds, with a row per client and a column per entry, for any number."""
    entries, clients, digits = ordered(comparison), comparison["clients"], DIGITS[metric]
    stats = [own(entry, "own", metric) or {} for entry in entries]
    rows = [
        [words(c), *(number(mean((stat.get("clients") or {}).get(c)), digits) for stat in stats)] for c in clients
    ]
    rows.append([words("mean"), *(number(mean(stat), digits) for stat in stats)])
    left_out = unranked(entries, metric)
    marked = [_mark_best(row, lowest=metric in LOWER_IS_BETTER, left_out=left_out) for row in rows]
    group = place_words(comparison, own_state_words(comparison), "own")
    header = (Column("silo", words=True), *(Column(entry["name"], group) for entry in entries))
    return _by_client(comparison, metric, "row", header, marked)


def _mark_best(row: Sequence[Cell], *, lowest: bool, left_out: Collection[int]) -> tuple[Cell, ...]:
    """Return a row with its best numbers marked, if there are at least two."""
    marked = mark_best([(cell,) for cell in row[1:]], 0, lowest=lowest, left_out=left_out)
    return (row[0], *(cell for (cell,) in marked))


def _by_client(
    comparison: Comparison, metric: str, last: str, header: tuple[Column, ...], rows: Sequence[tuple[Cell, ...]]
) -> Table:
    title = f"{(METRICS | REWARDS)[metric]} by client"
    return Table(f"clients-{metric}", title, client_note(comparison, metric, last), header, tuple(rows))


def robust_table(comparison: Comparison) -> Table:
    """Return interquartile means and probabilities of improvement over the reference."""
    entries = [entry for entry in ordered(comparison) if any(over_silos(entry, metric) for metric in METRICS)]
    rows = [
        (words(e["name"]), own_state(e), *(c for metric in METRICS for c in _robust(e, metric))) for e in entries
    ]
    rows = mark_best(rows, 2, left_out=unranked(entries, "rouge_l"))
    rows = mark_best(rows, 4, lowest=True, left_out=unranked(entries, "nll"))
    level = f"{100 * comparison['confidence']:g} %"
    better = f"P(better than {comparison['reference']}) [{level}]"
    header = (*WHO, *(Column(text, name) for name in METRICS.values() for text in (f"IQM [{level}]", better)))
    seeds = ", and in every silo and entry its seeds" if len(comparison["seeds"]) > 1 else ", not seeds"
    drawn = (
        "In brackets a bootstrap: in every silo, test rows are drawn with replacement, the same for all "
        f"entries{seeds}. It is for these silos. IQMs share their rows, so two may differ although their "
        "intervals overlap; the interval of P is biased towards 0.5. "
        if any(map(_has_ends, entries))
        else ""
    )
    note = (
        "IQM: interquartile mean, the mean of the middle half of all scores, one for each silo and seed: silos "
        "far above or below the others do not change it. P: the probability that a seed of the entry is better "
        "than one of the reference in the same silo, mean over silos; 0.5: neither is better. Both as in "
        f"Agarwal et al., NeurIPS 2021. {drawn}{counts(comparison)}"
    )
    return Table("robust", "Interquartile mean and probability of improvement", note, header, tuple(rows))


def _has_ends(entry: Entry) -> bool:
    return any((over_silos(entry, metric).get("iqm") or {}).get("low") is not None for metric in METRICS)


def _robust(entry: Entry, metric: str) -> tuple[Cell, Cell]:
    found = over_silos(entry, metric)
    return bounded(found.get("iqm"), DIGITS[metric]), bounded(found.get("improvement"), 2)


def spread_table(comparison: Comparison) -> Table:
    """Return how far the silos' NLL of own states are apart, and how many silos an entry harms."""
    found = [(entry, its) for entry in ordered(comparison) if (its := over_silos(entry, "nll"))]
    rows = [(words(e["name"]), own_state(e), *_spread(e, its)) for e, its in found]
    left_out = unranked([entry for entry, _ in found], "nll")
    for column in (2, 3, 5, 6):
        rows = mark_best(rows, column, lowest=True, left_out=left_out)
    group = place_words(comparison, own_state_words(comparison), "own")
    level = f"{100 * comparison['confidence']:g} %"
    header = (
        *WHO,
        Column("mean", group),
        Column("std over silos", group),
        Column("worst silo", words=True),
        Column("its NLL", group),
        Column("mean of worst tenth", group),
        Column(f"harmed silos, % [{level}]", f"worse than {comparison['reference']}"),
    )
    about = (
        "Harmed: silos in which the entry's score is worse than the reference's, by however little; two equal "
        "entries have about half. In brackets Wilson's interval of this share, which takes the silos as drawn at "
        "random from many. "
    )
    note = (
        "NLL, lower is better; each silo's score is its mean over seeds. The worst tenth is rounded up to whole "
        "silos. The worst are picked by the same scores, and so look worse than they are. "
        f"{about if any(its.get('harmed') for _, its in found) else ''}{counts(comparison)}"
    )
    return Table("spread", "Spread over silos", note, header, tuple(rows))


def _spread(entry: Entry, found: Mapping[str, Any]) -> tuple[Cell, ...]:
    digits, worst = DIGITS["nll"], found["worst"]
    return (
        number(mean(own(entry, "own", "nll")), digits),
        number(found["std"], digits),
        words(worst["client"]),
        number(worst["value"], digits),
        number(found["worst_tenth"], digits),
        harmed(found["harmed"]),
    )


def harmed(found: Mapping[str, Any] | None) -> Cell:
    """Return ``3 of 19: 15.8 [5.5, 37.6]``."""
    if not found:
        return Cell(MISSING)
    in_percent = {key: 100 * found[key] for key in ("value", "low", "high")}
    return Cell(f"{found['count']} of {found['silos']}: {bounded(in_percent, 1).text}", found["value"])


def rounds_table(comparison: Comparison) -> Table:
    """Return the NLL of own states by the number of rounds that a silo trained in, if silos differ in it."""
    entries = [entry for entry in ordered(comparison) if entry.get("rounds_trained")]
    groups = entries[0]["rounds_trained"] if entries else []
    names = [Column(f"{its['rounds']} ({its['count']})", "rounds (how many silos and seeds)") for its in groups]
    rows = [
        (words(e["name"]), own_state(e), *(number(its["nll"], DIGITS["nll"]) for its in e["rounds_trained"]))
        for e in entries
    ]
    for column in range(2, len(groups) + 2):
        rows = mark_best(rows, column, lowest=True, left_out=unranked(entries, "nll"))
    others = [e["name"] for e in ordered(comparison) if entries and not e["rounds_trained"]]
    left_out = (
        f"Left out, because their silos trained in other rounds or seeds: {', '.join(others)}. " if others else ""
    )
    note = (
        "NLL, lower is better: mean over the pairs of a silo and a seed that trained in equally many of the "
        "recipe's rounds; a method's extra rounds are not counted. Each column has other silos, so only entries "
        f"within one compare. {left_out}{counts(comparison)}"
    )
    return Table("rounds_trained", "By rounds of training", note, (*WHO, *names), tuple(rows))


def newcomer_table(comparison: Comparison) -> Table:
    """Return the scores of clients that joined the finished runs, in every state; none is in any other table."""
    names: Sequence[str] = comparison.get("newcomers") or []
    entries = ordered(comparison) if any(entry.get("newcomers") for entry in comparison["entries"]) else []
    columns = [(state, metric) for state in STATES for metric in METRICS]
    rows: list[tuple[Cell, ...]] = []
    for name in [*names, *([None] if len(names) > 1 else [])]:
        its = [
            (words(name or "mean"), words(e["name"]), *(_of_newcomer(e, name, *column) for column in columns))
            for e in entries
        ]
        for place, (state, metric) in enumerate(columns, 2):
            if state != "zero_shot":
                lowest = metric in LOWER_IS_BETTER
                its = mark_best(its, place, lowest=lowest, left_out=unranked(entries, metric))
        rows += its
    heads = (Column("newcomer", words=True), Column("entry", words=True))
    header = (*heads, *(Column(METRICS[metric], STATES[state]) for state, metric in columns))
    without = [entry["name"] for entry in entries if not entry.get("newcomers")]
    no_model = f"No model for newcomers: {', '.join(without)}. " if without else ""
    note = (
        f"{', '.join(names)}: in no run, but joined the finished ones, whose shared weights no longer change. A "
        f"newcomer trains its personal part on its own train rows and is scored on its own {comparison['split']} "
        "rows; with an entry that has no personal part, it uses the global model and has no personalized score. "
        f"{no_model}Bold: each newcomer's best, significant or not. No other table has these scores."
    )
    return Table("newcomers", "Newcomers", note, header, tuple(rows))


def _of_newcomer(entry: Entry, name: str | None, state: str, metric: str) -> Cell:
    """Return a newcomer's score in a state, or the mean over newcomers."""
    found: Mapping[str, Any] = ((entry.get("newcomers") or {}).get(state) or {}).get(metric) or {}
    return spread(found if name is None else (found.get("clients") or {}).get(name), DIGITS[metric])
