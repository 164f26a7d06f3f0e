"""Where a run is, read from its directory: the process that writes it is not asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.files import writer
from flexperts.recipe import recorded_recipe

_SHOWN = 5
"""Most rounds in ``last_rounds``."""


def status(run: RunDirectory) -> dict[str, Any]:
    """Return where a run is, as plain JSON.

    Returns:
        ``state`` ("running", "stopped", "finished") and ``writer``, the process that writes it, if there is one;
        ``rounds`` done and planned; ``seconds_since`` the last round; ``bytes`` up and down of all rounds;
        ``epsilon`` after the last one, None without noise; ``silos`` and ``last_rounds`` as in the tables.
    """
    recipe, rounds = recorded_recipe(run.path), run.finished_rounds(run.written_rounds())
    held, written = writer(run.path), run.last_round_at()
    return {
        "run": run.path.resolve().name,
        "method": recipe.method.name,
        "state": "finished" if run.is_finished else "running" if held else "stopped",
        "writer": held,
        "rounds": {"done": len(rounds), "planned": rounds[-1]["planned"] if rounds else recipe.federation.rounds},
        "seconds_since": None if written is None else max(0.0, time.time() - written),
        "bytes": {way: sum(sum(one[way].values()) for one in rounds) for way in ("uplink", "downlink")},
        "epsilon": _epsilon(rounds[-1]) if rounds else None,
        "silos": _silos(rounds),
        "last_rounds": [_round(one) for one in rounds[-_SHOWN:]],
    }


def _silos(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by silo, in how many rounds it was drawn, used, missing, refused, and the last one that used it."""
    found: dict[str, dict[str, Any]] = {}
    for one in rounds:
        for name in {*one["participants"], *one["clients"], *one["refused"]}:
            silo = found.setdefault(
                name,
                {"drawn": 0, "used": 0, "missing": 0, "refused": 0, "last_used": None, "loss": None, "late": False},
            )
            told = one["clients"].get(name)
            silo["drawn"] += name in one["participants"]
            silo["missing"] += name in one["missing"]
            silo["refused"] += name in one["refused"]
            silo["late"] = name in one["missing"]
            if told is not None:
                silo |= {"used": silo["used"] + 1, "last_used": one["number"], "loss": told.get("loss")}
    return dict(sorted(found.items()))


def _round(one: Mapping[str, Any]) -> dict[str, Any]:
    losses = [told["loss"] for told in one["clients"].values() if told.get("loss") is not None]
    return {
        "number": one["number"],
        "used": len(one["clients"]),
        "drawn": len(one["participants"]),
        "loss": mean(losses) if losses else None,
        "seconds": one["seconds"],
        "bytes": {way: sum(one[way].values()) for way in ("uplink", "downlink")},
        "epsilon": _epsilon(one),
    }


def _epsilon(one: Mapping[str, Any]) -> float | None:
    return None if one["privacy"] is None else float(one["privacy"]["epsilon"])
