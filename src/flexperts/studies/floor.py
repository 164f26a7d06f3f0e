"""What a run's floor brought: the models that clients keep against each simple choice, on test rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from flexperts.seeding import derive_seed
from flexperts.studies.contrast import Predictions, row_texts, texts_of
from flexperts.studies.finished import Finished
from flexperts.studies.statistics import Difference, Floats, Paired, paired_bootstrap, worst_tenth

_Records = Mapping[str, Mapping[str, Any]]
SIMPLE = ("zero_shot", "global", "local", "personalized")
"""The choices that a run without a floor makes for all clients alike."""
BEST = "best"
"""The candidate of each client with the lowest NLL on its test rows, known only afterwards."""


def harmed(differences: Floats) -> Floats:
    """Return the share of clients whose NLL is higher: ``[C, ...]`` to ``[...]``."""
    return np.asarray((differences > 0).mean(axis=0))


def floors(entry: Finished, confidence: float, resamples: int) -> dict[str, Any] | None:
    """Return an entry's floor over all seeds; None if its runs had none, or have no scores by row.

    Returns:
        ``kept``: candidate -> how many clients keep it, over all seeds. ``against``: simple choice, or best -> the
        differences in NLL of what clients keep: ``mean`` over clients, share of clients ``harmed``, mean of the
        ``worst`` tenth (rounded up), each with an interval. Against the best, the mean is the regret; the best is
        not picked again in each resample, so the interval is cut at 0, below which no regret is. ``loss`` is
        dpo where the differences are in DPO's loss instead.
    """
    seeds = list(entry.choices.values())
    if not seeds:
        return None
    same_rows = len({row_texts(rows) for rows in entry.predictions.values()}) == 1
    settings = {"same_rows": same_rows, "resamples": resamples, "confidence": confidence}
    against: dict[str, dict[str, Any]] = {}
    for simple in (*SIMPLE, BEST):
        paired = [_paired(entry.choices[seed], simple, entry.predictions[seed]) for seed in entry.runs]
        found = [each for each in paired if each is not None]
        if len(found) == len(paired):
            against[simple] = _tests(found, partial(_stream, entry.name, simple), settings, simple == BEST)
    kept = Counter(record["chosen"] for records in seeds for record in records.values())
    dpo = {"loss": "dpo"} if any("dpo" in its["test"] for records in seeds for its in records.values()) else {}
    return {"kept": dict(sorted(kept.items())), "against": against, **dpo}


def _paired(records: _Records, simple: str, predictions: Predictions) -> Paired | None:
    """Return each client's row-by-row difference of what it keeps to a choice; None where a score is missing."""
    differences, weights = {}, {}
    for client, record in records.items():
        test = record["test"]
        means = {name: loss for name, loss in (test.get("dpo") or test["nll"]).items() if loss is not None}
        name = min(means, key=lambda each: means[each], default=simple) if simple == BEST else simple
        if name not in means or record["chosen"] not in means:
            return None
        differences[client] = _column(test, record["chosen"]) - _column(test, name)
        weights[client] = np.array(test["tokens"], dtype=float)
    return Paired(differences, weights, texts_of(predictions))


def _column(test: Mapping[str, Any], name: str) -> Floats:
    return np.array(test["rows"][name], dtype=float)


def _stream(entry: str, simple: str, kind: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(0, "bootstrap", "floor", simple, kind, entry))


def _tests(
    seeds: Sequence[Paired],
    stream: Callable[[str], np.random.Generator],
    settings: Mapping[str, Any],
    is_best: bool,
) -> dict[str, Any]:
    kinds = {"mean": None, "harmed": harmed, "worst": worst_tenth}
    found = {
        kind: paired_bootstrap(seeds, generator=stream(kind), over=over, **settings) for kind, over in kinds.items()
    }
    found["harmed"] = _within(found["harmed"], 0.0, 1.0)
    if is_best:
        found |= {kind: _within(found[kind], 0.0) for kind in ("mean", "worst")}
    return {kind: {key: value for key, value in vars(its).items() if key != "p"} for kind, its in found.items()}


def _within(found: Difference, lowest: float, highest: float = math.inf) -> Difference:
    """Return a difference with its interval cut to the values that there can be."""
    if found.low is None or found.high is None:
        return found
    low, high = (min(highest, max(lowest, end)) for end in (found.low, found.high))
    return Difference(found.difference, low, high, found.p)
