"""Metrics of a run for Prometheus, as a file: the process of a run listens on no port.

The textfile collector of node_exporter reads it. Importing this needs the extra ``metrics``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from flexperts.artifacts import RunDirectory
from flexperts.errors import ArtifactError, logged
from flexperts.files import unwritable
from flexperts.observer import Observer
from flexperts.status.status import RunStatus

_READABLE = 0o644
"""Mode of the files: node_exporter runs as another user."""

log = logging.getLogger(__name__)


class RunMetrics(Observer):
    """Observer that writes what ``flexperts status`` shows of a run, after each round.

    Args:
        folder: Folder of the file, flexperts_run_NAME.prom.
        run: The run.
    """

    def __init__(self, folder: Path, run: RunDirectory) -> None:
        self._run = run
        self._path = folder / f"flexperts_run_{run.path.name}.prom"

    def round(self, record: Mapping[str, Any]) -> None:
        """Write the file."""
        self.write()

    def write(self) -> None:
        """Write the file, if there has been a round; a failure is logged and stops nothing."""
        try:
            if self._run.has_rounds():
                write_metrics(self._path, _of_run(RunStatus(self._run).look(), self._run.last_round_at() or 0.0))
        except ArtifactError as error:
            log.warning("%s", logged(error))


def _of_run(found: Mapping[str, Any], last: float) -> CollectorRegistry:
    """Return the metrics of a run's status.

    Args:
        found: The status.
        last: When the last round was written, in seconds since 1970.
    """
    registry = CollectorRegistry()

    def gauge(name: str, help_: str, *labels: str) -> Gauge:
        return Gauge(name, help_, ["run", *labels], namespace="flexperts_run", registry=registry)

    run, latest = found["run"], found["last_rounds"][-1]
    gauge("rounds_done", "Finished rounds").labels(run).set(found["rounds"]["done"])
    gauge("rounds_planned", "Planned rounds").labels(run).set(found["rounds"]["planned"])
    gauge("last_round_timestamp_seconds", "When the last round ended").labels(run).set(last)
    states = gauge("state", "1 for the state that the run is in", "state")
    for state in ("running", "stopped", "finished"):
        states.labels(run, state).set(state == found["state"])
    seconds = gauge("round_seconds", "Seconds of the last round by phase", "phase")
    for phase, spent in latest["seconds"].items():
        seconds.labels(run, phase).set(spent)
    sizes = gauge("bytes", "Bytes of all rounds by direction", "direction")
    for way, size in found["bytes"].items():
        sizes.labels(run, way).set(size)
    epsilon = gauge("epsilon", "Epsilon after the last round; none without noise")
    if found["epsilon"] is not None:
        epsilon.labels(run).set(found["epsilon"])
    rounds = gauge("silo_rounds", "Rounds by what came of the silo's update", "silo", "outcome")
    late = gauge("silo_late", "1 if the silo was missing in its last round", "silo")
    for silo, its in found["silos"].items():
        late.labels(run, silo).set(its["late"])
        for outcome in ("used", "missing", "refused"):
            rounds.labels(run, silo, outcome).set(its[outcome])
    return registry


def write_metrics(path: Path, registry: CollectorRegistry) -> None:
    """Write a file atomically; the collector reads names that end in .prom only."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(generate_latest(registry))
        part.chmod(_READABLE)
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
