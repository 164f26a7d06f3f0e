"""What a run comes to: scores, bytes and seconds, as summary.json holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flexperts.config.run import RunConfig
from flexperts.evaluation.scores import SCORES
from flexperts.federation.privacy import privacy_spent
from flexperts.federation.round_log import RoundLog

_STATES = ("zero_shot", "global", "personalized")


def summarize(
    config: RunConfig,
    rounds: list[RoundLog],
    seconds: Mapping[str, float],
    base: str,
    train_rows: Mapping[str, int],
) -> dict[str, Any]:
    """Put a finished run into one mapping.

    ``mean`` is over clients, each counting once (macro); ``weighted_mean`` counts each by its scored rows. A state
    that the method does not have is null. ``planned`` is how many rounds the run was to have, after which round:
    one entry, unless it was given other rounds than it was started with. Clients that sent no scores stand
    under ``unscored`` with the reason, and
    in no mean. ``privacy`` is what differential privacy guarantees; null without noise.

    Args:
        config: The run.
        rounds: What the server measured; the last round holds the final scores.
        seconds: Wall time by stage.
        base: Fingerprint of the base.
        train_rows: Client -> its train rows.
    """
    scores = rounds[-1].scores
    clients = {name: _client(metrics, train_rows[name]) for name, metrics in sorted(scores.items())}
    weights = {name: float(metrics["rows"]) for name, metrics in scores.items()}
    return {
        "method": config.method.name,
        "seed": config.seed,
        "rounds": len(rounds),
        "planned": _planned(rounds),
        "split": config.evaluation.split,
        "base": {"name": config.model.base, "fingerprint": base},
        "clients": clients,
        "unscored": dict(sorted(rounds[-1].unscored.items())),
        "mean": _means(clients, dict.fromkeys(clients, 1.0)),
        "weighted_mean": _means(clients, weights),
        "parameters": {group: _parameters(rounds, group) for group in ("shared", "personal")},
        "bytes": _bytes(rounds),
        "privacy": privacy_spent(config, len(rounds)),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _planned(rounds: Iterable[RoundLog]) -> list[dict[str, int]]:
    """Return where the number of rounds that a run was to have was set: after which round, and to what."""
    planned = [log.planned for log in rounds]
    starts = [i for i, total in enumerate(planned) if total and (i == 0 or total != planned[i - 1])]
    return [{"after": i, "rounds": planned[i]} for i in starts]


def _client(metrics: Mapping[str, float | int], train_rows: int) -> dict[str, Any]:
    scores = {kind: {state: metrics.get(f"{kind}.{state}") for state in _STATES} for kind in SCORES}
    return {**scores, "train_rows": train_rows, "scored_rows": metrics["rows"]}


def _means(clients: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    return {
        kind: {state: _mean({n: c[kind][state] for n, c in clients.items()}, weights) for state in _STATES}
        for kind in SCORES
    }


def _mean(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    known = {name: value for name, value in values.items() if value is not None}
    total = sum(weights[name] for name in known)
    return sum(weights[n] * v for n, v in known.items()) / total if known else None


def _parameters(rounds: Iterable[RoundLog], group: str) -> int:
    """Return the most parameters of a group that any client has trained in a round."""
    counts = (metrics[f"{group}_parameters"] for log in rounds for metrics in log.clients.values())
    return int(max(counts, default=0))


def _bytes(rounds: Iterable[RoundLog]) -> dict[str, Any]:
    logs = list(rounds)
    up = [size for log in logs for size in log.uplink.values()]
    down = [size for log in logs for size in log.downlink.values()]
    return {
        "uplink_per_client_per_round": sum(up) / max(1, len(up)),
        "downlink_per_client_per_round": sum(down) / max(1, len(down)),
        "uplink_total": sum(up),
        "downlink_total": sum(down),
        "evaluation_total": sum(sum(sizes.values()) for log in logs for sizes in log.evaluation.values()),
        "personal_sent": sum(log.personal_sent for log in logs),
        "groups": {way: _by_group(log.groups[way] for log in logs) for way in ("uplink", "downlink")},
    }


def _by_group(rounds: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, float]:
    """Return mean payload bytes of every group of tensors, per client and round."""
    payloads = [groups for clients in rounds for groups in clients.values()]
    names = sorted({name for groups in payloads for name in groups})
    return {name: sum(groups.get(name, 0) for groups in payloads) / len(payloads) for name in names}
