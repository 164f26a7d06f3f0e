"""Where a run is, as plain JSON: all of it for programs, and as much as a page can show."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from statistics import mean
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.errors import printable
from flexperts.files import writer
from flexperts.methods.registry import total_rounds
from flexperts.recipe import recorded_recipe
from flexperts.status.rounds import FinishedRounds

_LAST = 5
"""Rounds in ``last_rounds``, over which the seconds of a round are averaged, too."""
_SILOS, _POINTS = 100, 500
"""Most silos and rounds that a page shows of a run."""


class RunStatus:
    """Where a run is; looking again reads only what is new.

    Args:
        run: The run.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run, self._recipe = run, recorded_recipe(run.path)
        self._finished = FinishedRounds(run.rounds_file)
        self._reference: RunStatus | None = None

    def look(self) -> dict[str, Any]:
        """Return where the run is now.

        Returns:
            ``state`` ("running", "stopped", "finished") and ``writer``, the process that writes it, if there is
            one; ``rounds`` done and planned, with the method's extra ones; ``round_seconds``, the mean of the last
            ones; ``seconds_since`` the last round; ``bytes`` up and down of all rounds; ``epsilon`` after the last
            one, None without noise; ``silos`` and ``last_rounds`` as in the tables.
        """
        self._finished.look()
        written = self._finished.changed_at
        return {
            **self._state(),
            **self._totals(),
            "seconds_since": None if written is None else max(0.0, time.time() - written),
            "silos": dict(sorted(self._finished.silos.items())),
            "last_rounds": self._finished.rounds[-_LAST:],
        }

    def look_for_page(self, seen: str | None = None) -> dict[str, Any]:
        """Return what a page shows now; its size is bounded.

        Args:
            seen: The version that the page has seen.

        Returns:
            ``version``; if that is not the one seen, also ``status``: ``run``, ``state`` and ``writer``,
            ``last_round_at`` in seconds since 1970, and ``runs``: the method's, and the reference method's once
            that has begun. Each has ``points``, its rounds or, of many, every k-th (k is ``every``); ``silos``, of
            many those that were late, missing or refused most, and how many ``more_silos`` there are.
        """
        if self._reference is None and (self._run.reference / "config.toml").is_file():
            self._reference = RunStatus(RunDirectory(self._run.reference))
        both = [self] if self._reference is None else [self, self._reference]
        for one in both:
            one._finished.look()
        state = self._state()
        marks = repr((state, [one._finished.version for one in both]))
        version = hashlib.sha256(marks.encode()).hexdigest()[:16]
        if version == seen:
            return {"version": version}
        written = [at for one in both if (at := one._finished.changed_at) is not None]
        status = {**state, "last_round_at": max(written, default=None), "runs": [one._for_page() for one in both]}
        return {"version": version, "status": status}

    def _state(self) -> dict[str, Any]:
        held = writer(self._run.path)
        state = "finished" if self._run.is_finished else "running" if held else "stopped"
        return {"run": self._run.path.resolve().name, "state": state, "writer": held}

    def _totals(self) -> dict[str, Any]:
        rounds = self._finished.rounds
        recipe = self._recipe
        planned = rounds[-1]["planned"] if rounds else total_rounds(recipe.method, recipe.federation.rounds)
        return {
            "method": recipe.method.name,
            "rounds": {"done": len(rounds), "planned": planned},
            "round_seconds": mean(sum(one["seconds"].values()) for one in rounds[-_LAST:]) if rounds else None,
            "bytes": {way: sum(one["bytes"][way] for one in rounds) for way in ("uplink", "downlink")},
            "epsilon": rounds[-1]["epsilon"] if rounds else None,
        }

    def _for_page(self) -> dict[str, Any]:
        rounds, silos = self._finished.rounds, self._finished.silos
        every = -(-len(rounds) // _POINTS) or 1
        shown = sorted(silos, key=lambda name: _trouble(name, silos[name]))[:_SILOS]
        return {
            **self._totals(),
            "every": every,
            "points": rounds[::-1][::every][::-1],  # the last round is one of them
            "silos": [{"name": printable(name), **silos[name]} for name in shown],
            "more_silos": len(silos) - len(shown),
        }


def _trouble(name: str, silo: Mapping[str, Any]) -> tuple[bool, int, str]:
    """Return a key that sorts silos which are late first, then those most often missing or refused."""
    return not silo["late"], -silo["missing"] - silo["refused"], name
