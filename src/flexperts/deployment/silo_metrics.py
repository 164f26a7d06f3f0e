"""Metrics of a silo for Prometheus, as a file, because its worker has no network; see ``run_metrics``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary

from flexperts.client.answer import ANSWERS
from flexperts.deployment.ledger import Ledger
from flexperts.deployment.request_log import Entry, Outcome
from flexperts.deployment.run_metrics import write_metrics
from flexperts.errors import ArtifactError, logged

_NO_KIND = "none"
"""The kind of a request that could not be read."""

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
        for kind in (*ANSWERS, _NO_KIND):  # from zero, so that Prometheus sees the first one, too
            for outcome in get_args(Outcome):
                self._requests.labels(silo, kind, outcome)
        self._write()

    def count(self, entry: Entry) -> None:
        """Count a request, and write the file; a failure is logged and stops nothing."""
        kind = entry.kind or _NO_KIND
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
        write_metrics(self._path, self._registry)
