"""Metrics for Prometheus as files: a worker has no network, and the process of a run listens on no port.

The textfile collector of node_exporter reads them. Importing this needs the extra ``metrics``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, generate_latest

from flexperts.artifacts import RunDirectory
from flexperts.deployment.ledger import Ledger
from flexperts.deployment.request_log import Entry
from flexperts.errors import ArtifactError, logged
from flexperts.files import unwritable
from flexperts.observer import Observer
from flexperts.server.status import status

_READABLE = 0o644
"""Mode of the files: node_exporter runs as another user."""

log = logging.getLogger(__name__)


class SiloMetrics:
    """What a silo has been asked since its worker started, and what it has released in all.

    Args:
        path: The file; its name ends in .prom.
        silo: The silo's name.
        ledger: What it has released.

    Raises:
        ArtifactError: The file cannot be written.
    """

    def __init__(self, path: Path, silo: str, ledger: Ledger) -> None:
        self._path, self._silo, self._ledger = path, silo, ledger
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry, "namespace": "flexperts_silo"}
        self._requests = Counter("requests", "Requests by kind and outcome", ["silo", "kind", "outcome"], **made)
        self._seconds = Summary("request_seconds", "Seconds until the reply", ["silo", "kind"], **made)
        self._bytes = Counter("bytes", "Bytes of requests and replies", ["silo", "direction"], **made)
        self._last = Gauge("last_request_timestamp_seconds", "Time of the last request", ["silo"], **made)
        self._started = Gauge("start_timestamp_seconds", "When the worker started", ["silo"], **made)
        self._epsilon = Gauge("epsilon", "Epsilon of all runs; +Inf without local noise", ["silo"], **made)
        self._budget = Gauge("epsilon_budget", "policy.max_epsilon", ["silo"], **made)
        self._round = Gauge("round", "Last round that it trained in a run", ["silo", "run", "method"], **made)
        self._started.labels(silo).set(time.time())
        self._write()

    def count(self, entry: Entry) -> None:
        """Count a request, and write the file; a failure is logged and stops nothing."""
        kind = entry.kind or "none"
        self._requests.labels(self._silo, kind, entry.outcome).inc()
        self._seconds.labels(self._silo, kind).observe(entry.seconds)
        self._bytes.labels(self._silo, "received").inc(entry.received or 0)
        self._bytes.labels(self._silo, "sent").inc(entry.sent)
        self._last.labels(self._silo).set(time.time())
        try:
            self._write()
        except ArtifactError as error:
            log.warning("%s", logged(error))

    def _write(self) -> None:
        runs, policy = self._ledger.runs, self._ledger.policy
        self._epsilon.labels(self._silo).set(self._ledger.epsilon(*runs.values()))
        if policy.max_epsilon is not None:
            self._budget.labels(self._silo).set(policy.max_epsilon)
        for run, spent in runs.items():
            self._round.labels(self._silo, run, spent.method).set(spent.round)
        _write(self._path, self._registry)


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
                _write(self._path, _of_run(status(self._run), self._run.last_round_at() or 0.0))
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


def _write(path: Path, registry: CollectorRegistry) -> None:
    """Write a file atomically; the collector reads names that end in .prom only."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(generate_latest(registry))
        part.chmod(_READABLE)
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
