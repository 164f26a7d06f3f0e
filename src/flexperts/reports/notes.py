"""What stands under a table: what the numbers are, and what their intervals cover."""

from __future__ import annotations

from flexperts.reports.reading import METRICS, Comparison, Entry


def counts(comparison: Comparison) -> str:
    """Return how many seeds and clients stand behind the numbers, and which entries have fewer seeds."""
    seeds, clients = len(comparison["seeds"]), len(comparison["clients"])
    text = f"{_count(seeds, 'seed')}, {_count(clients, 'client')}."
    fewer = [
        f"{e['name']} ({len(e['seeds'])} of {seeds})" for e in comparison["entries"] if len(e["seeds"]) < seeds
    ]
    return f"{text} Seeds are missing of: {', '.join(fewer)}." if fewer else text


def interval_note(comparison: Comparison) -> str:
    """Return what the intervals and p-values are; empty where nothing is compared."""
    compared = sum(bool(entry.get("against")) for entry in comparison["entries"])
    if not compared:
        return ""
    level, resamples = f"{100 * comparison['confidence']:g} %", f"{comparison['resamples']:,}"
    many = len(comparison["seeds"]) > 1
    seeds = "widened by Student's t for the training seeds" if many else "which says nothing of other seeds"
    single = [e["name"] for e in comparison["entries"] if many and e.get("against") and _paired(comparison, e) == 1]
    seeds += f" (not of {', '.join(single)}: one seed in common)" if single else ""
    return (
        f"Δ: own state minus the reference's own state ({comparison['reference']}), row by row. In brackets the "
        f"{level} interval of a paired bootstrap over rows ({resamples} resamples), {seeds}; of clients that were "
        "not there it says nothing. p-values are of the same draws, adjusted by Benjamini and Hochberg for "
        f"{_count(compared, 'comparison')}; the intervals are not adjusted."
    )


def _paired(comparison: Comparison, entry: Entry) -> int:
    """Return how many seeds an entry has in common with the reference."""
    reference = next(e for e in comparison["entries"] if e["name"] == comparison["reference"])
    return len({*entry["seeds"]} & {*reference["seeds"]})


def main_note(comparison: Comparison) -> str:
    """Return the note of the comparison."""
    return _joined(_score_words(comparison), _best_words(comparison), interval_note(comparison), counts(comparison))


def client_note(comparison: Comparison, metric: str) -> str:
    """Return the note of a table by client."""
    better = "lower" if metric == "nll" else "higher"
    spread = "mean ± sample standard deviation over seeds" if len(comparison["seeds"]) > 1 else "one seed"
    text = f"{METRICS[metric]}, {better} is better; {spread}. The last column is the plain mean over clients."
    return _joined(text, _best_words(comparison), counts(comparison))


def ability_note(comparison: Comparison) -> str:
    """Return the note of the table of general ability."""
    text = (
        "General tasks: instructions on which no client trained. MMLU: multiple choice by likelihood; with four "
        f"choices, chance is 25 %. Minus zero-shot: minus the untouched base{_ability_words(comparison)}; "
        "below 0 for ROUGE-L and accuracy, above 0 for NLL, is ability lost."
    )
    return _joined(text, counts(comparison))


def _ability_words(comparison: Comparison) -> str:
    if any(entry.get("ability") for entry in comparison["entries"]):
        return (
            f", in brackets the {100 * comparison['confidence']:g} % interval of a paired bootstrap over the rows "
            "of these tasks, not adjusted for how many are shown"
        )
    return " (mean ± sample standard deviation, paired by seed)" if len(comparison["seeds"]) > 1 else ""


def _score_words(comparison: Comparison) -> str:
    spread = " ± sample standard deviation over seeds" if len(comparison["seeds"]) > 1 else " of one seed"
    return (
        "ROUGE-L in points from 0 to 100, higher is better; NLL in nats per response token, lower is better: plain "
        f"mean over clients{spread}. Own: each client's own {comparison['split']} rows; others': of the other "
        "clients. Entries stand best first."
    )


def _best_words(comparison: Comparison) -> str:
    return "Bold is the best mean of its column, whatever its interval." if len(comparison["entries"]) > 1 else ""


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
