"""What training cost in general ability: trained states against the untouched base, on tasks nobody trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flexperts.evaluation.scores import SCORES
from flexperts.evaluation.statistics import Paired, paired_bootstrap
from flexperts.seeding import derive_seed
from flexperts.studies.finished import Finished

_BASE = "zero_shot"
_ByClient = Mapping[str, Mapping[str, Any]]


def abilities(entry: Finished, confidence: float, resamples: int) -> dict[str, dict[str, Any]]:
    """Return, by trained state and score, the state's score minus the untouched base's, on general tasks.

    Every client's model answers the same rows, so a row's difference is the mean over clients, and rows are drawn
    for all clients and seeds together.

    Returns:
        State -> score -> difference, interval and p-value; empty where runs did not score general tasks by row,
        without the scores of which a row is not finite.
    """
    seeds = [beyond.get("general", {}) for beyond in entry.beyond]
    states = [state for state in entry.states if state != _BASE and all(_has_rows(seed, state) for seed in seeds)]
    wanted = [(state, kind) for state in states for kind in SCORES if _is_whole(seeds, (state, _BASE), kind)]
    found: dict[str, dict[str, Any]] = {}
    for state, kind in wanted:
        found.setdefault(state, {})[kind] = _test(entry.name, seeds, state, kind, confidence, resamples)
    return found


def _has_rows(seed: Mapping[str, _ByClient], state: str) -> bool:
    needed = [seed.get(state, {}), seed.get(_BASE, {})]
    return all(clients and all("by_row" in found for found in clients.values()) for clients in needed)


def _is_whole(seeds: Any, states: tuple[str, ...], kind: str) -> bool:
    """Tell whether every row has a finite score in all seeds."""
    rows = (row for seed in seeds for state in states for found in seed[state].values() for row in found["by_row"])
    return all(row[kind] is not None for row in rows)


def _test(name: str, seeds: Any, state: str, kind: str, confidence: float, resamples: int) -> dict[str, float]:
    result = paired_bootstrap(
        [_paired(seed[state], seed[_BASE], kind) for seed in seeds],
        same_rows=True,
        resamples=resamples,
        confidence=confidence,
        generator=np.random.default_rng(derive_seed(0, "bootstrap", "general", state, kind, name)),
    )
    return vars(result).copy()


def _paired(trained: _ByClient, base: _ByClient, kind: str) -> Paired:
    differences = _over_clients(trained, kind) - _over_clients(base, kind)
    weights = _over_clients(base, "tokens") if kind == "nll" else np.ones(len(differences))
    return Paired({"general": differences}, {"general": weights})


def _over_clients(clients: _ByClient, key: str) -> Any:
    """Return every row's number ``[R]``, its mean over clients."""
    return np.mean([[row[key] for row in found["by_row"]] for found in clients.values()], axis=0)
