"""Each entry against the reference: paired differences on the same rows, with interval and p-value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexperts.artifacts import RunDirectory
from flexperts.errors import ArtifactError
from flexperts.evaluation.statistics import Paired, adjust, paired_bootstrap
from flexperts.seeding import derive_seed
from flexperts.studies.finished import Finished

_WEIGHTS = {"rouge_l": None, "nll": "tokens"}
"""Score -> what weights its rows; None weights all alike."""


def contrasts(
    finished: Sequence[Finished], reference: Finished, confidence: float, resamples: int
) -> dict[str, dict[str, Any]]:
    """Return, by entry and score, its own state minus the reference's, on the clients' own rows.

    Pairs are formed over the seeds that both have finished; an entry that has none in common is left out. The
    p-values of one score are adjusted over all entries (Benjamini-Hochberg).

    Raises:
        ArtifactError: The runs were scored on different rows.
    """
    others = [f for f in finished if f is not reference and f.runs.keys() & reference.runs.keys()]
    found: dict[str, dict[str, Any]] = {entry.name: {} for entry in others}
    for kind in _WEIGHTS:
        tests = [_test(entry, reference, kind, confidence, resamples) for entry in others]
        for entry, test, p in zip(others, tests, adjust([test["p"] for test in tests]), strict=True):
            found[entry.name][kind] = test | {"p_adjusted": p}
    return found


def _test(entry: Finished, reference: Finished, kind: str, confidence: float, resamples: int) -> dict[str, float]:
    seeds = [seed for seed in entry.runs if seed in reference.runs]
    pairs = [(entry.runs[seed], reference.runs[seed]) for seed in seeds]
    states = entry.states[-1], reference.states[-1]
    paired = [_paired(a, b, states, entry.clients, kind) for a, b in pairs]
    result = paired_bootstrap(
        paired,
        same_rows=len({_identity(run, entry.clients) for run, _ in pairs}) == 1,
        resamples=resamples,
        confidence=confidence,
        generator=np.random.default_rng(derive_seed(0, "bootstrap", kind, entry.name)),
    )
    return vars(result).copy()


def _paired(
    run: RunDirectory, reference: RunDirectory, states: tuple[str, str], clients: Sequence[str], kind: str
) -> Paired:
    if _identity(run, clients) != _identity(reference, clients):
        raise ArtifactError(
            f"{run.path} and {reference.path}",
            "compared runs are scored on the same rows",
            "run them on one recipe",
        )
    differences, weights = {}, {}
    for client in clients:
        ours, theirs = (_column(r, client, s, kind) for r, s in zip((run, reference), states, strict=True))
        differences[client] = ours - theirs
        weight = _WEIGHTS[kind]
        weights[client] = np.ones(len(ours)) if weight is None else _column(run, client, states[0], weight)
    return Paired(differences, weights)


def _column(run: RunDirectory, client: str, state: str, kind: str) -> Any:
    return np.array([line["scores"][state][kind] for line in run.of_client("predictions", client)], dtype=float)


def _identity(run: RunDirectory, clients: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the rows that a run was scored on, as texts."""
    lines = (line for client in clients for line in run.of_client("predictions", client))
    return tuple((line["instruction"], line["context"], line["response"]) for line in lines)
