"""What a run's floor brought: the models that clients keep against each simple choice, on test rows.

If the worst clients, or the best model, are picked by the rows on which they are then measured, harm and regret are
found also where there is none. So a client's rows are two halves here: what is picked on one is measured on the
other, both ways.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from statistics import fmean
from typing import Any

import numpy as np

from flexperts.seeding import derive_seed
from flexperts.studies.contrast import Predictions, have_same_rows, texts_of
from flexperts.studies.finished import Finished
from flexperts.studies.statistics import Difference, Floats, Paired, paired_bootstrap

_Records = Mapping[str, Mapping[str, Any]]
_Test = Callable[[Sequence[Paired], str], Difference]
_HALVES = slice(0, None, 2), slice(1, None, 2)
SIMPLE = ("zero_shot", "global", "local", "personalized")
"""The choices that a run without a floor makes for all clients alike."""
BEST = "best"
"""The candidate of each client with the lowest NLL on its other test rows, known only afterwards."""


def floors(entry: Finished, confidence: float, resamples: int) -> dict[str, Any] | None:
    """Return an entry's floor over all seeds; None if its runs had none, or have no scores by row.

    Returns:
        ``kept``: candidate -> how many clients keep it, over all seeds. ``against``: simple choice, or best -> the
        differences in NLL of what clients keep: ``mean`` over clients (against the best, the regret) and mean of
        the ``worst`` tenth of clients (rounded up), each with an interval; and ``harmed``, the number of clients
        with a difference above 0 in the mean over seeds, of them ``clear`` those whose own interval is above 0.
        ``loss`` is dpo where the differences are in DPO's loss instead.
    """
    seeds = list(entry.choices.values())
    if not seeds:
        return None
    same_rows = have_same_rows(entry.predictions.values())

    def test(simple: str, paired: Sequence[Paired], kind: str) -> Difference:
        generator = np.random.default_rng(derive_seed(0, "bootstrap", "floor", simple, kind, entry.name))
        return paired_bootstrap(
            paired, same_rows=same_rows, resamples=resamples, confidence=confidence, generator=generator
        )

    against: dict[str, dict[str, Any]] = {}
    for simple in (*SIMPLE, BEST):
        paired = [_paired(entry.choices[seed], simple, entry.predictions[seed]) for seed in entry.runs]
        found = [each for each in paired if each is not None]
        if len(found) == len(paired):
            against[simple] = _measures(found, partial(test, simple))
    kept = Counter(record["chosen"] for records in seeds for record in records.values())
    dpo = {"loss": "dpo"} if any("dpo" in its["test"] for records in seeds for its in records.values()) else {}
    return {"kept": dict(sorted(kept.items())), "against": against, **dpo}


def _paired(records: _Records, simple: str, predictions: Predictions) -> Paired | None:
    """Return each client's row-by-row difference of what it keeps to a choice; None where a score is missing."""
    differences, weights = {}, {}
    for client, record in records.items():
        test = record["test"]
        means = {name: loss for name, loss in (test.get("dpo") or test["nll"]).items() if loss is not None}
        weights[client] = np.array(test["tokens"], dtype=float)
        losses = {name: np.array(test["rows"][name], dtype=float) for name in means}
        if simple == BEST and len(weights[client]) > 1:
            losses[BEST] = _best_of_the_other_half(losses, weights[client])
        if simple not in losses or record["chosen"] not in losses:
            return None
        differences[client] = losses[record["chosen"]] - losses[simple]
    return Paired(differences, weights, texts_of(predictions))


def _best_of_the_other_half(losses: Mapping[str, Floats], weights: Floats) -> Floats:
    """Return for every row, ``[R]``, the loss of the candidate that is best on the half without this row."""
    best = np.empty(len(weights))
    for half, other in (_HALVES, _HALVES[::-1]):
        name = min(losses, key=lambda each: np.average(losses[each][other], weights=weights[other]))
        best[half] = losses[name][half]
    return best


def _measures(seeds: Sequence[Paired], test: _Test) -> dict[str, Any]:
    """Return the measures of ``floors`` against one choice, from each seed's differences."""
    clients = list(seeds[0].differences)
    each = [test([_parts(seed, [(c, slice(None))]) for seed in seeds], c) for c in clients]
    found = {"mean": test(seeds, "mean")}
    if all(len(rows) > 1 for seed in seeds for rows in seed.differences.values()):
        found["worst"] = test(_worst_by_the_other_half(seeds), "worst")
    harmed = {
        "count": sum(its.difference > 0 for its in each),
        "clear": sum(its.low is not None and its.low > 0 for its in each),
        "clients": len(clients),
    }
    told = {kind: {key: value for key, value in vars(its).items() if key != "p"} for kind, its in found.items()}
    return told | {"harmed": harmed}


def _worst_by_the_other_half(seeds: Sequence[Paired]) -> list[Paired]:
    """Return each seed's differences of the worst tenth of clients: on the half by which they were not picked."""
    clients, parts = seeds[0].differences, []
    for picked, measured in (_HALVES, _HALVES[::-1]):
        means = {
            c: fmean(np.average(s.differences[c][picked], weights=s.weights[c][picked]) for s in seeds)
            for c in clients
        }
        worst = sorted(means, key=lambda client: means[client])[-ceil(len(means) / 10) :]
        parts += [(client, measured) for client in worst]
    return [_parts(seed, parts) for seed in seeds]


def _parts(seed: Paired, parts: Sequence[tuple[str, slice]]) -> Paired:
    """Return a seed's differences on parts of clients' rows; each part is a client of its own."""
    named = {f"{number} {client}": (client, rows) for number, (client, rows) in enumerate(parts)}
    return Paired(
        {name: seed.differences[client][rows] for name, (client, rows) in named.items()},
        {name: seed.weights[client][rows] for name, (client, rows) in named.items()},
        seed.rows and {name: seed.rows[client][rows] for name, (client, rows) in named.items()},
    )
