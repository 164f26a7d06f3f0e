"""What changed over the rounds: means over clients, with the lowest and the highest seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexperts.evaluation.scores import SCORES, mean_of
from flexperts.studies.finished import Finished


def curves(entry: Finished) -> dict[str, Any]:
    """Return, by state, each score over the rounds that were evaluated; under ``training`` the training loss."""
    rounds = [run.rounds() for run in entry.runs.values()]
    wanted = {"training": {"nll": ("clients", "loss")}}
    wanted |= {state: {score: ("scores", f"{score}.{state}") for score in SCORES} for state in entry.states}
    found = {
        state: {score: curve for score, where in scores.items() if (curve := _curve(rounds, *where))}
        for state, scores in wanted.items()
    }
    return {state: scores for state, scores in found.items() if scores}


def _curve(seeds: Sequence[Sequence[Mapping[str, Any]]], part: str, key: str) -> dict[str, Any] | None:
    """Return one number over rounds; None where no round has it in every seed."""
    points: dict[int, list[float]] = {}
    for logs in zip(*seeds, strict=False):
        values = [value for log in logs if (value := _mean(log[part], key)) is not None]
        if len(values) == len(logs):
            points[logs[0]["number"]] = values
    if not points:
        return None
    table = np.array(list(points.values()))
    ends = {"mean": table.mean(1), "low": table.min(1), "high": table.max(1)}
    return {"rounds": list(points)} | {name: over.tolist() for name, over in ends.items()}


def _mean(clients: Mapping[str, Mapping[str, float | None]], key: str) -> float | None:
    return mean_of(numbers[key] for numbers in clients.values() if key in numbers)
