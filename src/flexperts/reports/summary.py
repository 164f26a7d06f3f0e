"""The summary of a comparison in a few sentences, generated from the numbers."""

from __future__ import annotations

from typing import Any

from flexperts.reports.cells import interval, number, p_value, spread
from flexperts.reports.reading import (
    METRICS,
    STATES,
    Comparison,
    Entry,
    against,
    holds_zero,
    mean,
    ordered,
    own,
    stat,
    verdict,
)
from flexperts.reports.score_tables import DIGITS


def summary(comparison: Comparison) -> list[str]:
    """Return sentences: the best entry, its interval against the reference, and the verdicts of the others."""
    scored = [e for e in ordered(comparison) if mean(own(e, "own", "rouge_l")) is not None]
    by_nll = [e for e in comparison["entries"] if mean(own(e, "own", "nll")) is not None]
    if not scored and not by_nll:
        return ["No entry has a score yet."]
    best = min(by_nll, key=lambda e: mean(own(e, "own", "nll")) or 0.0) if by_nll else None
    sentences = [_best(comparison, scored[0], "rouge_l")] if scored else []
    if best is not None and len(comparison["entries"]) > 1:
        if scored and best["name"] == scored[0]["name"]:
            sentences.append(f"It is also best by NLL ({spread(own(best, 'own', 'nll'), DIGITS['nll']).text}).")
        else:
            sentences.append(_best(comparison, best, "nll"))
    elif best is not None and not scored:
        sentences.append(_best(comparison, best, "nll"))
    return [*sentences, *_standing(comparison, "rouge_l" if scored else "nll"), *_caution(comparison)]


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the comparison's size: name and value, such as ("clients", "4")."""
    found = [(_plural(comparison["entries"], "entry", "entries"), comparison["entries"])]
    found += [
        (_plural(comparison[f"{name}s"], name, f"{name}s"), comparison[f"{name}s"]) for name in ("client", "seed")
    ]
    return [(name, str(len(values))) for name, values in found] + [("scored rows", comparison["split"])]


def _best(comparison: Comparison, entry: Entry, metric: str) -> str:
    name, state = entry["name"], STATES.get(entry["own_state"], entry["own_state"])
    score = spread(own(entry, "own", metric), DIGITS[metric]).text
    if len(comparison["entries"]) == 1:
        start = number(mean(stat(entry, "zero_shot", "own", metric)), DIGITS[metric])
        base = "" if start.value is None else f"; the untouched base has {start.text}"
        return (
            f"{name} ({state}) has {METRICS[metric]} {score} on its clients' own {comparison['split']} rows{base}."
        )
    where = f"on the clients' own {comparison['split']} rows"
    role = ", the reference," if name == comparison["reference"] else ""
    lead = f"{name} ({state}){role} has the best {METRICS[metric]} {where}: {score}."
    return f"{lead}{_difference(comparison, entry, metric)}"


def _difference(comparison: Comparison, entry: Entry, metric: str) -> str:
    test, found = against(entry, metric), verdict(comparison, entry, metric)
    if test is None or found == "none":
        return ""
    p = p_value(test.get("p_adjusted"))
    adjusted = "" if p.value is None else f" (adjusted p {p.text if p.text.startswith('<') else '= ' + p.text})"
    zero = "includes 0" if holds_zero(test) else "excludes 0"
    so = ": not statistically significant" if holds_zero(test) else ": not significant after adjustment"
    so = so if found == "open" else ""
    level, text = f"{100 * comparison['confidence']:g} %", interval(test, DIGITS[metric]).text
    return f" Its difference to {comparison['reference']} is {text}; the {level} interval {zero}{adjusted}{so}."


def _standing(comparison: Comparison, metric: str) -> list[str]:
    """Return how many entries differ significantly from the reference."""
    found = [verdict(comparison, entry, metric) for entry in comparison["entries"]]
    total = len(found) - found.count("none")
    if total < 2:
        return []
    better, worse, undecided = (found.count(kind) for kind in ("better", "worse", "open"))
    return [
        f"Of {total} entries compared with {comparison['reference']} by {METRICS[metric]}, {better} "
        f"{'is' if better == 1 else 'are'} better and {worse} worse, with an interval that excludes 0 and an "
        f"adjusted p below {1 - comparison['confidence']:.2g}; {undecided} {'is' if undecided == 1 else 'are'} not "
        "significantly different."
    ]


def _caution(comparison: Comparison) -> list[str]:
    """Return a caution if a comparison has only one seed."""
    compared = any(entry.get("against") for entry in comparison["entries"])
    one = compared and len(comparison["seeds"]) == 1
    return ["All scores are from one seed; another seed may give another order."] if one else []


def _plural(values: Any, one: str, many: str) -> str:
    return one if len(values) == 1 else many
