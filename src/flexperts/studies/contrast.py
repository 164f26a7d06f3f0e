"""Paired differences with interval and p-value: entries against the reference, states against the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flexperts.artifacts import RunDirectory
from flexperts.errors import ArtifactError
from flexperts.evaluation.scores import SCORES
from flexperts.seeding import derive_seed
from flexperts.studies.finished import Finished
from flexperts.studies.statistics import Floats, Paired, adjust, paired_bootstrap

Rows = Sequence[Mapping[str, Any]]
Predictions = Mapping[str, Rows]
_WEIGHTS = {"rouge_l": None, "nll": "tokens", "reward_margin": None, "reward_accuracy": None}
"""Score -> the weight of its rows; None means equal weights."""


def contrasts(
    finished: Sequence[Finished], reference: Finished, confidence: float, resamples: int
) -> dict[str, dict[str, Any]]:
    """Return, by entry and score, the entry's last scored state minus the reference's, on the clients' own rows.

    Pairs are formed over the seeds that both have finished. An entry without a common seed is left out, and so is a
    score that is not finite on some row, and NLL over other tokens. The p-values of one score are adjusted over all
    its tests (Benjamini-Hochberg).
    """
    others = [f for f in finished if f is not reference and f.runs.keys() & reference.runs.keys()]
    found: dict[str, dict[str, Any]] = {entry.name: {} for entry in others}
    for kind in _WEIGHTS:
        tests = [_test(entry, reference, kind, confidence, resamples) for entry in others]
        made = [(entry, test) for entry, test in zip(others, tests, strict=True) if test is not None]
        adjusted = iter(adjust([test["p"] for _, test in made if test["p"] is not None]))
        for entry, test in made:
            found[entry.name][kind] = test | {"p_adjusted": None if test["p"] is None else next(adjusted)}
    return found


def other_tokens(entry: Finished, reference: Finished) -> dict[str, int] | None:
    """Return whether an entry's NLL is over other tokens than the reference's, such as those of longer chats.

    Returns:
        Over the seeds that both have finished, the number of scored ``rows``, and of those that ``differ``; None
        where none does.
    """
    seeds = [seed for seed in entry.runs if seed in reference.runs]
    ours, theirs = ([count for seed in seeds for count in _tokens(of, seed)] for of in (entry, reference))
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return {"rows": len(ours), "differ": differ} if differ else None


def is_comparable(entry: Finished, reference: Finished, kind: str) -> bool:
    """Return whether an entry's score is over the same as the reference's on the same rows."""
    return kind != "nll" or other_tokens(entry, reference) is None


def _tokens(entry: Finished, seed: int) -> list[int | None]:
    """Return the number of tokens over which each row's NLL is; no numbers where rows stay at the silos."""
    state, found = entry.scored_states[-1], entry.predictions[seed].values()
    return [row["scores"][state].get("tokens") for rows in found for row in rows or ()]


def _test(
    entry: Finished, reference: Finished, kind: str, confidence: float, resamples: int
) -> dict[str, Any] | None:
    seeds = [seed for seed in entry.runs if seed in reference.runs]
    states = entry.scored_states[-1], reference.scored_states[-1]
    pairs = [(entry.predictions[seed], reference.predictions[seed]) for seed in seeds]
    for seed, (ours, theirs) in zip(seeds, pairs, strict=True):
        _check_same(entry.runs[seed], reference.runs[seed], ours, theirs)
    if not is_comparable(entry, reference, kind):
        return None
    paired = [_paired(ours, theirs, states, kind) for ours, theirs in pairs]
    found = [test for test in paired if test is not None]
    if len(found) < len(paired):
        return None
    result = paired_bootstrap(
        found,
        same_rows=have_same_rows(ours for ours, _ in pairs),
        resamples=resamples,
        confidence=confidence,
        generator=np.random.default_rng(derive_seed(0, "bootstrap", kind, entry.name)),
    )
    return vars(result).copy()


def _check_same(run: RunDirectory, reference: RunDirectory, ours: Predictions, theirs: Predictions) -> None:
    if row_texts(ours) != row_texts(theirs):
        raise ArtifactError(
            f"{run.path} and {reference.path}",
            "compared runs must be scored on the same rows",
            "run both with the same data settings",
        )


def _paired(ours: Predictions, theirs: Predictions, states: tuple[str, str], kind: str) -> Paired | None:
    differences, weights = {}, {}
    for client, rows in ours.items():
        scores, weights[client] = columns_of(rows, states[0], kind)
        differences[client] = scores - columns_of(theirs[client], states[1], kind)[0]
    is_whole = all(np.isfinite(values).all() for values in differences.values())
    return Paired(differences, weights, texts_of(ours)) if is_whole else None


def columns_of(rows: Rows, state: str, kind: str) -> tuple[Floats, Floats]:
    """Return one score of every row and the rows' weights, ``[R]`` each.

    A score is not-a-number where it is null, or the rows have no such score.
    """
    scores, weight = [row["scores"][state] for row in rows], _WEIGHTS[kind]
    weights = [1.0 if weight is None else its[weight] for its in scores]
    return np.array([its.get(kind) for its in scores], dtype=float), np.array(weights, dtype=float)


def have_same_rows(seeds: Iterable[Predictions]) -> bool:
    """Return whether runs were scored on the same rows."""
    return len({row_texts(rows) for rows in seeds}) == 1


def row_texts(predictions: Predictions) -> tuple[tuple[str, ...], ...]:
    """Return the texts of the rows on which a run was scored."""
    return tuple(_text(line) for rows in predictions.values() for line in rows or ())


def texts_of(predictions: Predictions) -> dict[str, list[tuple[str, ...]]]:
    """Return each client's texts, by which its rows are the same rows in other seeds."""
    return {client: [_text(row) for row in rows] for client, rows in predictions.items()}


def _text(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the text by which a row is the same row, also in other runs and at other clients."""
    before = (turn["content"] for turn in row.get("before", ()))
    return row["instruction"], row["context"], row["response"], *before


_BASE = "zero_shot"
_ByClient = Mapping[str, Mapping[str, Any]]


def abilities(entry: Finished, confidence: float, resamples: int) -> dict[str, dict[str, Any]]:
    """Return, by trained state and score, the state's score minus the unchanged base's, on general tasks.

    Every client's model answers the same rows, so a row's difference is the mean over clients, and rows are drawn
    for all clients and seeds together.

    Returns:
        State -> score -> difference, interval and p-value; empty if the runs did not score general tasks by row.
        Scores that are not finite on some row are left out.
    """
    seeds = [beyond.get("general", {}) for beyond in entry.beyond]
    states = [state for state in entry.states if state != _BASE and all(_has_rows(seed, state) for seed in seeds)]
    wanted = [(state, kind) for state in states for kind in SCORES if _is_whole(seeds, (state, _BASE), kind)]
    found: dict[str, dict[str, Any]] = {}
    for state, kind in wanted:
        found.setdefault(state, {})[kind] = _ability_test(entry.name, seeds, state, kind, confidence, resamples)
    return found


def _has_rows(seed: Mapping[str, _ByClient], state: str) -> bool:
    needed = [seed.get(state, {}), seed.get(_BASE, {})]
    return all(clients and all("by_row" in found for found in clients.values()) for clients in needed)


def _is_whole(seeds: Any, states: tuple[str, ...], kind: str) -> bool:
    """Return whether every row has a finite score in all seeds."""
    rows = (row for seed in seeds for state in states for found in seed[state].values() for row in found["by_row"])
    return all(row[kind] is not None for row in rows)


def _ability_test(
    name: str, seeds: Any, state: str, kind: str, confidence: float, resamples: int
) -> dict[str, Any]:
    result = paired_bootstrap(
        [_ability_pairs(seed[state], seed[_BASE], kind) for seed in seeds],
        same_rows=True,
        resamples=resamples,
        confidence=confidence,
        generator=np.random.default_rng(derive_seed(0, "bootstrap", "general", state, kind, name)),
    )
    return vars(result).copy()


def _ability_pairs(trained: _ByClient, base: _ByClient, kind: str) -> Paired:
    differences = _over_clients(trained, kind) - _over_clients(base, kind)
    weights = _over_clients(base, "tokens") if kind == "nll" else np.ones(len(differences))
    return Paired({"general": differences}, {"general": weights})


def _over_clients(clients: _ByClient, key: str) -> Any:
    """Return every row's mean over clients, ``[R]``."""
    return np.mean([[row[key] for row in found["by_row"]] for found in clients.values()], axis=0)
