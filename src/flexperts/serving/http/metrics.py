"""Metrics for Prometheus: requests, tokens and latencies as callers see them, and the engine's counters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from flexperts.serving.contract import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a separate registry; they contain nothing from prompts or keys."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry, "namespace": "flexperts"}
        self._requests = Counter("requests", "Chat requests by model and HTTP status", ["model", "status"], **made)
        self._tokens = Counter("tokens", "Tokens by model and kind", ["model", "kind"], **made)
        self._first = Histogram(
            "first_token_seconds", "From request to first token", ["model"], buckets=_SECONDS, **made
        )
        self._total = Histogram(
            "request_seconds", "From request to last token", ["model"], buckets=_SECONDS, **made
        )

    def show(self, engine: Engine) -> None:
        """Add an engine's counters to the metrics."""
        self._registry.register(_EngineCounters(engine))

    def request(self, model: str, status: int) -> None:
        """Count a chat request; the model is empty where the request named no existing one."""
        self._requests.labels(model, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """Record how long the first token took."""
        self._first.labels(model).observe(seconds)

    def answer(self, model: str, seconds: float, prompt: int, generated: int) -> None:
        """Record how long an answer took, and the tokens read and generated."""
        self._total.labels(model).observe(seconds)
        self._tokens.labels(model, "prompt").inc(prompt)
        self._tokens.labels(model, "generated").inc(generated)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineCounters(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        counters = self._engine.counters
        yield GaugeMetricFamily("flexperts_queue", "Requests that wait", self._engine.queue_length)
        yield GaugeMetricFamily("flexperts_running", "Requests that are being answered", self._engine.running)
        yield CounterMetricFamily("flexperts_forward_passes", "Forward passes", counters.steps)
        yield CounterMetricFamily("flexperts_forward_rows", "Rows of all forward passes", counters.rows)
        yield CounterMetricFamily("flexperts_prefills", "Forward passes that read prompts", counters.prefills)
