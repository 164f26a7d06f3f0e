"""Scores by the number of rounds that a client trained in: where a share is drawn, some are drawn less often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flexperts.evaluation.scores import mean_of
from flexperts.methods.registry import method_class
from flexperts.studies.finished import Finished

_Counts = dict[tuple[int, str], int]
"""(seed, client) -> in how many of the recipe's rounds it trained, without a method's extra ones."""


def by_rounds_trained(finished: Sequence[Finished], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Return, by entry, the mean NLL of its own state over the clients that trained in equally many rounds.

    Entries compare in this where their clients trained in the same numbers of rounds. Those of most entries are
    taken; entries with others, such as one with a warm-up of all clients, are left out. The untrained base is
    grouped as the others are.

    Args:
        finished: The entries.
        seeds: The seeds over which they are grouped; entries without one of them are left out.

    Returns:
        Entry -> groups by ``rounds``, from few to many: ``count`` of pairs of a seed and a client, and their mean
        ``nll``, None if one has none. Empty lists where all pairs have equally many rounds.
    """
    trained = {entry.name: _counts(entry, seeds) for entry in finished if not method_class(entry.method).pools_rows}
    varied = [counts for counts in trained.values() if len(set(counts.values())) > 1]
    usual = max(varied, key=varied.count, default={})
    alike = (usual, dict.fromkeys(usual, 0))
    return {e.name: _groups(e, usual) if usual and trained.get(e.name) in alike else [] for e in finished}


def _counts(entry: Finished, seeds: Sequence[int]) -> _Counts:
    found: _Counts = {}
    for seed in entry.runs.keys() & {*seeds}:
        logs = entry.runs[seed].rounds()[: entry.recipe.federation.rounds]
        counted = Counter(client for log in logs for client in log["clients"])
        found |= {(seed, client): counted[client] for client in entry.clients}
    return found


def _groups(entry: Finished, trained: Mapping[tuple[int, str], int]) -> list[dict[str, Any]]:
    own = entry.scored_states[-1]
    groups: dict[int, list[float | None]] = {rounds: [] for rounds in sorted(set(trained.values()))}
    for (seed, client), rounds in trained.items():
        groups[rounds].append(entry.scored[seed][client].get("nll", {}).get(own))
    return [{"rounds": rounds, "count": len(nlls), "nll": mean_of(nlls)} for rounds, nlls in groups.items()]
