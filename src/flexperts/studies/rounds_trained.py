"""Scores by the number of rounds that a client trained in: where a share is drawn, some are drawn less often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from flexperts.studies.finished import Finished


def rounds_trained(reference: Finished) -> dict[tuple[int, str], int]:
    """Return by seed and client in how many of the recipe's rounds it trained, without a method's extra ones."""
    found: dict[tuple[int, str], int] = {}
    for seed, run in reference.runs.items():
        logs = run.rounds()[: reference.recipe.federation.rounds]
        counted = Counter(client for log in logs for client in log["clients"])
        found |= {(seed, client): counted[client] for client in reference.clients}
    return found


def by_rounds_trained(entry: Finished, trained: Mapping[tuple[int, str], int]) -> list[dict[str, Any]]:
    """Return the mean NLL of an entry's own state over the clients that trained in equally many rounds.

    Args:
        entry: The entry.
        trained: (seed, client) -> rounds in which it trained with the comparison's reference, whose draw the
            entries share.

    Returns:
        By ``rounds``, from few to many: ``count`` of pairs of a seed and a client, and their mean ``nll``, None if
        one has none. Empty where all pairs have equally many rounds, or the entry lacks a pair.
    """
    own, counts = entry.scored_states[-1], sorted(set(trained.values()))
    scored = {(seed, c): its.get("nll", {}).get(own) for seed, of in entry.scored.items() for c, its in of.items()}
    if len(counts) < 2 or not trained.keys() <= scored.keys():
        return []
    groups = {rounds: [scored[pair] for pair, its in trained.items() if its == rounds] for rounds in counts}
    return [
        {"rounds": rounds, "count": len(nlls), "nll": None if None in nlls else fmean(nlls)}
        for rounds, nlls in groups.items()
    ]
