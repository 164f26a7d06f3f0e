"""The summary of a comparison in a few sentences, generated from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from flexperts.reports.cells import interval, number, p_value, spread
from flexperts.reports.notes import common_seeds
from flexperts.reports.reading import (
    METRICS,
    STATES,
    Comparison,
    Entry,
    against,
    holds_zero,
    is_ranked,
    mean,
    ordered,
    own,
    sorted_by_nll,
    stat,
    verdict,
)
from flexperts.reports.score_tables import DIGITS


def summary(comparison: Comparison) -> list[str]:
    """Return sentences: the best entry, its interval against the reference, and the verdicts of the others."""
    entries = comparison["entries"]
    with_rouge = [] if sorted_by_nll(comparison) else [e for e in ordered(comparison) if is_ranked(e, "rouge_l")]
    by_rouge = next((e for e in with_rouge if mean(own(e, "own", "rouge_l")) is not None), None)
    with_nll = [e for e in entries if mean(own(e, "own", "nll")) is not None]
    if not by_rouge and not with_nll:
        return ["No entry has a score yet."]
    by_nll = _lowest(with_nll)
    sentences = []
    if by_rouge:
        sentences.append(_best(comparison, by_rouge, "rouge_l"))
    if by_nll and by_nll is not by_rouge:
        sentences.append(_best(comparison, by_nll, "nll"))
    elif by_nll and len(entries) > 1:
        sentences.append(f"It is also best by NLL ({spread(own(by_nll, 'own', 'nll'), DIGITS['nll']).text}).")
    return [*sentences, *_standing(comparison, "rouge_l" if by_rouge else "nll"), *_caution(comparison)]


def _lowest(entries: Sequence[Entry]) -> Entry | None:
    """Return the entry with the lowest NLL; None if the tokens leave no two to compare."""
    ranked = [entry for entry in entries if is_ranked(entry, "nll")]
    if len(ranked) < min(2, len(entries)):
        return None
    return min(ranked, key=lambda entry: mean(own(entry, "own", "nll")) or 0.0, default=None)


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the comparison's size: name and value, such as ("clients", "4")."""
    found = []
    for one, many in (("entry", "entries"), ("client", "clients"), ("seed", "seeds")):
        count = len(comparison[many])
        found.append((one if count == 1 else many, str(count)))
    return [*found, ("scored rows", comparison["split"])]


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
    if holds_zero(test):
        zero, so = "includes 0", ": not statistically significant"
    else:
        zero, so = "excludes 0", ": not significant after adjustment" if found == "open" else ""
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
    """Return a caution where differences are over a single seed."""
    tested = [entry for entry in comparison["entries"] if entry.get("against")]
    single = [entry["name"] for entry in tested if common_seeds(comparison, entry) == 1]
    if not single:
        return []
    what = f"The differences of {', '.join(single)} are" if len(comparison["seeds"]) > 1 else "All scores are"
    return [f"{what} from one seed; another seed may give another order."]
