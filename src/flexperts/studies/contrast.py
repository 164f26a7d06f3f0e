"""Each entry against the reference: paired differences on the same rows, with interval and p-value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexperts.artifacts import RunDirectory
from flexperts.errors import ArtifactError
from flexperts.evaluation.statistics import Paired, adjust, paired_bootstrap
from flexperts.seeding import derive_seed
from flexperts.studies.finished import Finished

Rows = Sequence[Mapping[str, Any]]
Predictions = Mapping[str, Rows]
_WEIGHTS = {"rouge_l": None, "nll": "tokens"}
"""Score -> what weights its rows; None weights all alike."""


def contrasts(
    finished: Sequence[Finished], reference: Finished, confidence: float, resamples: int
) -> dict[str, dict[str, Any]]:
    """Return, by entry and score, its own state minus the reference's, on the clients' own rows.

    Pairs are formed over the seeds that both have finished; an entry that has none in common is left out, and so is
    a score of which a row is not finite. The p-values of one score are adjusted over all its tests
    (Benjamini-Hochberg).

    Raises:
        ArtifactError: The runs were scored on different rows.
    """
    others = [f for f in finished if f is not reference and f.runs.keys() & reference.runs.keys()]
    found: dict[str, dict[str, Any]] = {entry.name: {} for entry in others}
    for kind in _WEIGHTS:
        tests = [_test(entry, reference, kind, confidence, resamples) for entry in others]
        made = [(entry, test) for entry, test in zip(others, tests, strict=True) if test is not None]
        for (entry, test), p in zip(made, adjust([test["p"] for _, test in made]), strict=True):
            found[entry.name][kind] = test | {"p_adjusted": p}
    return found


def _test(
    entry: Finished, reference: Finished, kind: str, confidence: float, resamples: int
) -> dict[str, float] | None:
    seeds = [seed for seed in entry.runs if seed in reference.runs]
    states = entry.states[-1], reference.states[-1]
    pairs = [(entry.predictions[seed], reference.predictions[seed]) for seed in seeds]
    for seed, (ours, theirs) in zip(seeds, pairs, strict=True):
        _check_same(entry.runs[seed], reference.runs[seed], ours, theirs)
    paired = [_paired(ours, theirs, states, kind) for ours, theirs in pairs]
    found = [test for test in paired if test is not None]
    if len(found) < len(paired):
        return None
    result = paired_bootstrap(
        found,
        same_rows=len({_identity(ours) for ours, _ in pairs}) == 1,
        resamples=resamples,
        confidence=confidence,
        generator=np.random.default_rng(derive_seed(0, "bootstrap", kind, entry.name)),
    )
    return vars(result).copy()


def _check_same(run: RunDirectory, reference: RunDirectory, ours: Predictions, theirs: Predictions) -> None:
    if _identity(ours) != _identity(theirs):
        raise ArtifactError(
            f"{run.path} and {reference.path}",
            "compared runs are scored on the same rows",
            "run them on one recipe",
        )


def _paired(ours: Predictions, theirs: Predictions, states: tuple[str, str], kind: str) -> Paired | None:
    differences, weights = {}, {}
    for client, rows in ours.items():
        differences[client] = _column(rows, states[0], kind) - _column(theirs[client], states[1], kind)
        weight = _WEIGHTS[kind]
        weights[client] = np.ones(len(rows)) if weight is None else _column(rows, states[0], weight)
    is_whole = all(np.isfinite(values).all() for values in differences.values())
    return Paired(differences, weights) if is_whole else None


def _column(rows: Rows, state: str, kind: str) -> Any:
    return np.array([row["scores"][state][kind] for row in rows], dtype=float)  # null is not-a-number


def _identity(predictions: Predictions) -> tuple[tuple[str, ...], ...]:
    """Return the rows that a run was scored on, as texts."""
    lines = (line for rows in predictions.values() for line in rows)
    return tuple((line["instruction"], line["context"], line["response"]) for line in lines)
