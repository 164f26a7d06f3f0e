"""Access to ``comparison.json``: an entry's numbers, its verdict, words for states, the order of entries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

from flexperts.reports.cells import finite, interval

Entry = Mapping[str, Any]
Comparison = Mapping[str, Any]

STATES = {"zero_shot": "zero-shot", "global": "global", "personalized": "personalized", "chosen": "chosen"}
"""A state's name in ``comparison.json`` -> its name in reports."""
METRICS = {"rouge_l": "ROUGE-L", "nll": "NLL"}
"""A score's name in ``comparison.json`` -> its name in reports."""
REWARDS = {"reward_accuracy": "reward accuracy, %", "reward_margin": "reward margin"}
"""The same for the scores of preference rows."""
LOWER_IS_BETTER = {"nll"}
"""Scores of which less is better."""


def each_words(*sent: Mapping[str, Any]) -> str:
    """Return what bytes ``per_client_per_round`` are means over: in earlier versions, also rounds without weights.

    Args:
        sent: The bytes of summaries or entries.
    """
    weights = all("replies_with_weights" in its for its in sent)
    return "per client and round with weights" if weights else "per client and round"


def each_of(comparison: Comparison) -> str:
    """Return ``each_words`` of all entries."""
    return each_words(*(sent for entry in comparison["entries"] if (sent := entry.get("bytes"))))


def stat(entry: Entry, state: str, place: str, metric: str) -> Mapping[str, Any] | None:
    """Return mean, std and seeds of a state's score on some rows; None if it was not measured.

    Args:
        entry: The entry.
        state: A key of ``STATES``.
        place: own, others, general or mmlu.
        metric: a key of ``METRICS`` or ``REWARDS``; accuracy for mmlu.
    """
    found = ((entry.get("scores") or {}).get(state) or {}).get(place) or {}
    return found.get(metric) or None


def own(entry: Entry, place: str, metric: str) -> Mapping[str, Any] | None:
    """Return a score of the method's own final state."""
    return stat(entry, entry["own_state"], place, metric)


def mean(found: Mapping[str, Any] | None) -> float | None:
    """Return a statistic's mean, or None."""
    return finite(found.get("mean")) if found else None


def against(entry: Entry, metric: str) -> Mapping[str, Any] | None:
    """Return the test of an entry against the reference; None for the reference itself."""
    return (entry.get("against") or {}).get(metric) or None


def is_ranked(entry: Entry, metric: str) -> bool:
    """Return whether a score can be the best: not over other seeds than most entries', no NLL over other tokens."""
    return not entry.get("other_seeds") and (metric != "nll" or not entry.get("other_tokens"))


def unranked(entries: Iterable[Entry], metric: str) -> set[int]:
    """Return the places of the entries whose score cannot be the best."""
    return {place for place, entry in enumerate(entries) if not is_ranked(entry, metric)}


def verdict(comparison: Comparison, entry: Entry, metric: str) -> str:
    """Return an entry's verdict against the reference: better, worse, open (not significant), or none (no test).

    A difference is significant if the interval excludes 0 and the p-value, adjusted for the number of comparisons,
    is below 1 - confidence: of many intervals, some exclude 0 by chance.
    """
    test = against(entry, metric)
    if test is None or interval(test, 1).value is None:
        return "none"
    if holds_zero(test) or (finite(test.get("p_adjusted")) or 0.0) >= 1 - comparison["confidence"]:
        return "open"
    return "better" if (test["low"] > 0) != (metric in LOWER_IS_BETTER) else "worse"


def border_error(comparison: Comparison, entry: Entry, metric: str) -> float | None:
    """Return two standard errors of an adjusted p-value over the bootstrap's draws, if they reach the level.

    Of B draws, a share p / 2 is beyond zero, so p has the standard error 2 sqrt(p / 2 (1 - p / 2) / B); adjustment
    multiplies both.
    """
    test = against(entry, metric) or {}
    p, adjusted = finite(test.get("p")), finite(test.get("p_adjusted"))
    if not p or adjusted is None:
        return None
    error = 2 * adjusted / p * 2 * math.sqrt(p / 2 * (1 - p / 2) / comparison["resamples"])
    return error if abs(adjusted - (1 - comparison["confidence"])) <= error else None


def holds_zero(test: Mapping[str, Any]) -> bool:
    """Return whether a test's interval includes 0."""
    return bool(test["low"] <= 0 <= test["high"])


def ability(entry: Entry, state: str, metric: str) -> Mapping[str, Any] | None:
    """Return the test of a trained state against the unchanged base on general tasks; None if not scored by row."""
    return ((entry.get("ability") or {}).get(state) or {}).get(metric)


def over_silos(entry: Entry, metric: str) -> Mapping[str, Any]:
    """Return an entry's measures over silos of one score; empty if a score is missing, or in older comparisons."""
    return (entry.get("silos") or {}).get(metric) or {}


def change(entry: Entry, state: str, place: str, metric: str) -> dict[str, Any] | None:
    """Return mean and sample std over seeds of a state's score minus zero-shot, paired by seed."""
    ours, start = stat(entry, state, place, metric), stat(entry, "zero_shot", place, metric)
    if ours is None or start is None:
        return None
    first, second = mean(ours), mean(start)
    if first is None or second is None:
        return None
    seeds = [found.get("seeds") or [] for found in (ours, start)]
    if len(seeds[0]) != len(seeds[1]) or len(seeds[0]) < 2:
        return {"mean": first - second, "std": None}
    differences = [a - b for a, b in zip(*seeds, strict=True)]
    return {"mean": fmean(differences), "std": stdev(differences)}


def ordered(comparison: Comparison) -> list[Entry]:
    """Return entries best first: by ROUGE-L of the own state on own rows, then by NLL; unscored ones last.

    Where ``sorted_by_nll``, by NLL alone. What is not ranked comes after what is.
    """
    by_nll = sorted_by_nll(comparison)
    return sorted(comparison["entries"], key=lambda entry: _rank(entry)[3 if by_nll else 0 :])


def sorted_by_nll(comparison: Comparison) -> bool:
    """Return whether ROUGE-L cannot order the entries: answers have one token, or a choice has no answers."""
    is_one_token = re.search(r"^max_new_tokens = 1$", comparison.get("recipe") or "", re.MULTILINE)
    return bool(is_one_token) or any(entry["own_state"] == "chosen" for entry in comparison["entries"])


def trained_state(entry: Entry) -> str:
    """Return the last state of an entry's method, which has answers, routing and curves; a choice has none."""
    return str(entry.get("trained_state") or entry["own_state"])


def own_state_words(comparison: Comparison) -> str:
    """Return the name of the own state if all entries have the same, else "own state"."""
    states = {entry["own_state"] for entry in comparison["entries"]}
    return STATES.get(min(states), min(states)) if len(states) == 1 else "own state"


def rows_shown(comparison: Comparison) -> str:
    """Return the warning for the top of a page with rows of silos; empty if there are none."""
    shown = {client: len(rows) for client, rows in (comparison.get("examples") or {}).items() if rows}
    if not shown:
        return ""
    named = ", ".join(f"{client} ({count})" for client, count in shown.items())
    return (
        f"This page holds rows of these silos, with their passages and answers: {named}. "
        "Share it only with people who may read those rows."
    )


def routing_of(entry: Entry) -> Mapping[str, Any]:
    """Return client -> layer -> routing of an entry's trained state; empty if it was not recorded."""
    return (entry.get("routing") or {}).get(trained_state(entry)) or {}


def routing_measure(layer: Mapping[str, Any], key: str) -> float | None:
    """Return one number of a layer's routing: the number of dead experts, the mean of any other list."""
    found = layer.get(key)
    if not isinstance(found, list):
        return finite(found)
    if key == "dead":
        return float(len(found))
    present = [value for value in map(finite, found) if value is not None]
    return fmean(present) if present else None


def layer_names(modules: Iterable[str]) -> dict[str, str]:
    """Return experts module name -> short name, in numeric order: its first number, or the name if not unique."""
    modules = list(dict.fromkeys(modules))
    found = {name: re.search(r"\d+", name) for name in modules}
    short = {name: match.group() if match else name for name, match in found.items()}
    if len(set(short.values())) < len(modules):
        short = {name: name for name in modules}
    return dict(sorted(short.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _rank(entry: Entry) -> tuple[bool, bool, float, bool, bool, float]:
    rouge, nll = mean(own(entry, "own", "rouge_l")), mean(own(entry, "own", "nll"))
    by_rouge = not is_ranked(entry, "rouge_l"), rouge is None, -(rouge or 0.0)
    return *by_rouge, not is_ranked(entry, "nll"), nll is None, nll or 0.0
