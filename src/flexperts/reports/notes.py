"""The notes under tables: what the numbers are, and what their intervals cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flexperts.reports.cells import Table
from flexperts.reports.reading import (
    LOWER_IS_BETTER,
    METRICS,
    REWARDS,
    STATES,
    Comparison,
    Entry,
    against,
    border_error,
    sorted_by_nll,
    trained_state,
)

REFERENCE_MARK = " (reference)"
"""Follows the reference's name in the table of scores."""
_NAMED = 5
"""Most missing scores that one note explains."""


def counts(comparison: Comparison) -> str:
    """Return the numbers of seeds and clients, and the entries with fewer seeds."""
    seeds, clients = len(comparison["seeds"]), len(comparison["clients"])
    text = f"{_count(seeds, 'seed')}, {_count(clients, 'client')}."
    fewer = [
        f"{e['name']} ({len(e['seeds'])} of {seeds})" for e in comparison["entries"] if len(e["seeds"]) < seeds
    ]
    return f"{text} Seeds are missing of: {', '.join(fewer)}." if fewer else text


def interval_note(comparison: Comparison, metrics: Mapping[str, str] = METRICS) -> str:
    """Return the explanation of intervals and p-values of some scores; empty if nothing is compared."""
    scores: dict[int, list[str]] = {}
    for metric, name in metrics.items():
        if tests := sum(against(entry, metric) is not None for entry in comparison["entries"]):
            scores.setdefault(tests, []).append(name)
    if not scores:
        return ""
    differ = len(scores) > 1  # a score that is not finite has no test
    compared = ", ".join(
        _count(tests, "comparison") + (f" of {' and '.join(names)}" if differ else "")
        for tests, names in scores.items()
    )
    level, resamples = f"{100 * comparison['confidence']:g} %", f"{comparison['resamples']:,}"
    many = len(comparison["seeds"]) > 1
    seeds = "widened by Student's t for the training seeds" if many else "which does not cover other seeds"
    tested = [entry for entry in comparison["entries"] if many and entry.get("against")]
    single = [entry["name"] for entry in tested if common_seeds(comparison, entry) == 1]
    seeds += f" (not for {', '.join(single)}: one seed in common)" if single else ""
    return (
        f"Δ: own state minus the reference's own state ({comparison['reference']}), row by row. In brackets the "
        f"{level} interval of a paired bootstrap over rows ({resamples} resamples), {seeds}; it does not "
        "apply to other clients. p-values are from the same draws, adjusted by Benjamini and Hochberg for "
        f"{compared}; the intervals are not adjusted.{_border_words(comparison, metrics)}"
    )


def _border_words(comparison: Comparison, metrics: Mapping[str, str]) -> str:
    """Return the adjusted p-values for which other draws of the bootstrap could give the other verdict."""
    near = [
        f"{entry['name']}, {metrics[metric]}: {against(entry, metric)['p_adjusted']:.4f} ± {error:.4f}"  # type: ignore[index]
        for entry in comparison["entries"]
        for metric in metrics
        if (error := border_error(comparison, entry, metric)) is not None
    ]
    if not near:
        return ""
    level = f"{1 - comparison['confidence']:.2g}"
    return (
        f" Adjusted p-values so near {level} that other draws could give the other verdict, with two standard "
        f"errors of the draws: {'; '.join(near)}. More compare.resamples make them smaller."
    )


def with_budgets(table: Table, comparison: Comparison) -> Table:
    """Return a table with the budgets and variants of its entries' methods in its note, if it has any.

    Entries are a column, with or without one of other names before it, or the heads of columns.
    """
    if table.header[0].name == "silo":
        shown = {column.name for column in table.header}
    else:
        places = [place for place, column in enumerate(table.header) if column.name == "entry"]
        shown = {row[place].text.removesuffix(REFERENCE_MARK) for row in table.rows for place in places}
    methods: dict[str, list[str]] = {}
    for entry in comparison["entries"]:
        note, method = entry.get("budget_note"), entry.get("method") or entry["name"]
        if note and entry["name"] in shown and method not in methods.setdefault(note, []):
            methods[note].append(method)
    if not methods:
        return table
    told = "; ".join(f"{', '.join(names)}: {note}" for note, names in methods.items())
    return replace(table, note=_joined(table.note, f"Budgets and variants. {told}."))


def common_seeds(comparison: Comparison, entry: Entry) -> int:
    """Return the number of seeds that an entry has in common with the reference."""
    reference = next(e for e in comparison["entries"] if e["name"] == comparison["reference"])
    return len({*entry["seeds"]} & {*reference["seeds"]})


def main_note(comparison: Comparison) -> str:
    """Return the note of the comparison."""
    return _joined(
        _score_words(comparison),
        tokenizer_words(comparison),
        _cut_words(comparison),
        _not_finite_words(comparison),
        _token_words(comparison),
        _seed_words(comparison),
        _best_words(comparison),
        interval_note(comparison),
        counts(comparison),
    )


def client_note(comparison: Comparison, metric: str, last: str) -> str:
    """Return the note of a table by client; ``last`` says where its means are: in the last column or row."""
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    shown = "mean over seeds" if last == "row" else "mean ± sample standard deviation over seeds"
    shown = shown if len(comparison["seeds"]) > 1 else "one seed"
    best = _best_words(comparison).replace("column", "row" if last == "row" else "column")
    name = (METRICS | REWARDS)[metric]
    text = f"{name}, {better} is better; {shown}. The last {last} is the plain mean over clients."
    other = "Each seed has other rows, so a client of one seed is another silo than in the next."
    return _joined(text, other if comparison.get("redrawn") else "", best, counts(comparison))


def reward_note(comparison: Comparison) -> str:
    """Return the note of the table of preferences."""
    text = (
        "The reward of an answer is dpo_beta times its log-likelihood minus the base's, in nats. The margin is the "
        "reward of the chosen answer minus that of the rejected one, a mean over rows. Accuracy: the share of rows "
        "with a margin above 0; an equal pair counts half, so the untouched base has a margin of 0 and 50 %."
    )
    return _joined(text, _best_words(comparison), interval_note(comparison, REWARDS), counts(comparison))


def ability_note(comparison: Comparison) -> str:
    """Return the note of the table of general ability."""
    text = (
        "General tasks: instructions on which no client trained. MMLU: multiple choice by likelihood; with four "
        f"choices, guessing gives 25 %. Minus zero-shot: minus the untouched base{_ability_words(comparison)}; "
        "below 0 for ROUGE-L and accuracy, or above 0 for NLL, ability was lost."
    )
    return _joined(text, counts(comparison))


def floor_note(comparison: Comparison, entries: Sequence[Entry]) -> str:
    """Return the note of the table of what clients keep."""
    counted = ((e["name"], ((STATES.get(c, c), n) for c, n in e["floor"]["kept"].items())) for e in entries)
    kept = [f"{name}: {', '.join(f'{model} {n}' for model, n in its)}" for name, its in counted]
    level = f"{100 * comparison['confidence']:g} %"
    single = [entry["name"] for entry in entries if len(entry["seeds"]) == 1]
    without = f" (not for {', '.join(single)}: one seed)" if single else ""
    seeds = ", widened by Student's t for the training seeds" + without if len(single) < len(entries) else ""
    loss = "DPO loss" if any("loss" in entry["floor"] for entry in entries) else "NLL"
    chance = f"{50 * (1 - comparison['confidence']):g} %"
    text = (
        f"Each client keeps one model by its validation rows. Kept, over all seeds: {'; '.join(kept)}. Harmed: the "
        f"{loss} on its test rows is higher than this choice's, by however little; of two equal models about half "
        f"the clients are. Clearly: its own {level} interval is above 0; by chance {chance} of equal ones are. The "
        "worst tenth, and each client's best model, are picked on one half of the test rows and measured on the "
        "other, both ways. The mean against the best is the regret. In brackets the "
        f"{level} interval of a bootstrap over rows{seeds}; it does not apply to other clients."
    )
    return _joined(text, counts(comparison))


def _ability_words(comparison: Comparison) -> str:
    if any(entry.get("ability") for entry in comparison["entries"]):
        return (
            f", in brackets the {100 * comparison['confidence']:g} % interval of a paired bootstrap over the rows "
            "of these tasks, not adjusted for the number shown"
        )
    return " (mean ± sample standard deviation, paired by seed)" if len(comparison["seeds"]) > 1 else ""


def _score_words(comparison: Comparison) -> str:
    spread = " ± sample standard deviation over seeds" if len(comparison["seeds"]) > 1 else " of one seed"
    return (
        "ROUGE-L in points from 0 to 100, higher is better; NLL in nats per response token, lower is better: plain "
        f"mean over clients{spread}. Own: each client's own {comparison['split']} rows; others': of the other "
        f"clients. Entries are sorted{' by NLL' if sorted_by_nll(comparison) else ''}, best first."
        f"{_CHOSEN if any(entry['own_state'] == 'chosen' for entry in comparison['entries']) else ''}"
    )


_CHOSEN = (
    " Own state chosen: the model that each client keeps by its floor, of which no answers are generated, so that "
    "there is no ROUGE-L."
)


def tokenizer_words(comparison: Comparison) -> str:
    """Return the tokenizer of ROUGE-L, with a warning if entries differ; empty if it is not recorded."""
    by_name: dict[str, list[str]] = {}
    for entry in comparison["entries"]:
        if name := entry.get("rouge_tokenizer"):
            by_name.setdefault(name, []).append(entry["name"])
    if len(by_name) > 1 or any("," in name for name in by_name):
        who = "; ".join(f"{name} in {', '.join(entries)}" for name, entries in by_name.items())
        return (
            f"ROUGE-L was computed with different tokenizers ({who}): where texts contain non-English letters, "
            "these scores cannot be compared."
        )
    return f"ROUGE-L counts words as {next(iter(by_name))} does." if by_name else ""


def _cut_words(comparison: Comparison) -> str:
    """Return how many answers of trained states reached the token limit, and whether references are longer."""
    cut, longer = [], 0
    for entry in comparison["entries"]:
        clients = ((entry.get("answers") or {}).get("clients") or {}).values()
        count, rows = (
            sum(its["cut"][trained_state(entry)] for its in clients),
            sum(its["rows"] for its in clients),
        )
        cut += [f"{entry['name']} {count} of {rows}"] if count else []
        longer = max(longer, *(its["longer_references"] for its in clients), 0)
    said = f"Answers cut at evaluation.max_new_tokens: {', '.join(cut)}." if cut else ""
    return _joined(said, "Some references are longer than this limit." if longer else "")


def _not_finite_words(comparison: Comparison) -> str:
    """Return which scores are missing because they are not finite, and why."""
    found = [
        f"{entry['name']}, {client}, {STATES.get(state, state)}: {reason}"
        for entry in comparison["entries"]
        for client, states in (entry.get("not_finite") or {}).items()
        for state, reason in states.items()
    ]
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"No score, and no mean that includes it: {'; '.join(found[:_NAMED])}{more}." if found else ""


def _token_words(comparison: Comparison) -> str:
    """Return which entries' NLL is over other tokens than the reference's; empty if none is."""
    found = [
        f"{entry['name']}: its NLL is over other tokens than the reference's: "
        f"{its['differ']} of {its['rows']} rows differ"
        for entry in comparison["entries"]
        if (its := entry.get("other_tokens"))
    ]
    return f"{'; '.join(found)}. Such an NLL is neither compared nor marked as best." if found else ""


def _seed_words(comparison: Comparison) -> str:
    """Return which entries have other seeds than most; empty if none has."""
    found = [entry["name"] for entry in comparison["entries"] if entry.get("other_seeds")]
    text = "These have other seeds than most entries, so they come last, and none is marked as best"
    return f"{text}: {', '.join(found)}. Δ is over the seeds in common." if found else ""


def _best_words(comparison: Comparison) -> str:
    return "Bold: the best mean of its column, significant or not." if len(comparison["entries"]) > 1 else ""


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
