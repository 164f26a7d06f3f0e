"""A run's results as summary.json holds them: scores, bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flexperts.communication.traffic import mean_groups, mean_with_weights
from flexperts.config.run import RunConfig
from flexperts.evaluation.scores import REWARDS, SCORES, Scores, kinds_in
from flexperts.evaluation.words import TOKENIZER
from flexperts.methods.kit.method import State
from flexperts.server.round_log import RoundLog

_Metrics = Mapping[str, float | int | None]
_STATES = ("zero_shot", "global", "personalized")
_BASE = (
    "the untouched base's logits are not finite numbers on these rows, so the cause is the base and not the "
    "training; use other weights, or another model.dtype or model.precision"
)
_TRAINING = (
    "its model's logits are not finite numbers, and the untouched base's are: training has diverged; lower "
    "training.lr or training.personal_lr"
)


def summarize(
    config: RunConfig,
    rounds: list[RoundLog],
    seconds: Mapping[str, float],
    base: str,
    train_rows: Mapping[str, int],
) -> dict[str, Any]:
    """Return the summary of a finished run.

    ``mean`` counts each client once (macro); ``weighted_mean`` weights each client by its scored rows. A state that
    the method does not have is null. ``planned`` lists the planned number of rounds and the round after which it
    was set: one entry, unless the number was changed later. A client without scores is under ``unscored`` with the
    reason, and in neither mean. A score that is not a finite number is null, with the reason under ``not_finite``;
    a mean that includes it is null too. Only preference rows have ``reward_margin`` and ``reward_accuracy``. A
    client's ``answers`` are the longest answer in tokens, the number of scored references that are longer, and the
    number of cut answers of each state. ``privacy`` is the guarantee of differential privacy; null without noise.
    Bytes ``per_client_per_round`` are means over the messages that hold weights; if none does, over all.

    Args:
        config: The run.
        rounds: The server's records; the last round holds the final scores.
        seconds: Wall time in seconds by stage.
        base: Fingerprint of the base.
        train_rows: Client -> its train rows.
    """
    scores, answers = rounds[-1].scores, rounds[-1].answers
    clients = {n: _client(its, answers.get(n), train_rows[n]) for n, its in sorted(scores.items())}
    weights = {name: float(metrics["rows"] or 0) for name, metrics in scores.items()}
    return {
        "method": config.method.name,
        "seed": config.seed,
        "rounds": len(rounds),
        "planned": _planned(rounds),
        "split": config.evaluation.split,
        "base": {"name": config.model.base, "fingerprint": base},
        "clients": clients,
        "unscored": dict(sorted(rounds[-1].unscored.items())),
        "not_finite": {name: found for name, its in sorted(scores.items()) if (found := not_finite(its))},
        "rouge_tokenizer": TOKENIZER,
        "mean": _means(scores, dict.fromkeys(clients, 1.0)),
        "weighted_mean": _means(scores, weights),
        "parameters": {group: _parameters(rounds, group) for group in ("shared", "personal")},
        "bytes": traffic(rounds),
        "privacy": rounds[-1].privacy,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _planned(rounds: Iterable[RoundLog]) -> list[dict[str, int]]:
    """Return each planned number of rounds, and the round after which it was set."""
    planned = [log.planned for log in rounds]
    starts = [i for i, total in enumerate(planned) if total and (i == 0 or total != planned[i - 1])]
    return [{"after": i, "rounds": planned[i]} for i in starts]


def _client(metrics: _Metrics, answers: _Metrics | None, train_rows: int) -> dict[str, Any]:
    scores = {kind: {state: metrics.get(f"{kind}.{state}") for state in _STATES} for kind in _kinds(metrics)}
    return {**scores, "train_rows": train_rows, "scored_rows": metrics["rows"], "answers": _answers(answers)}


def _answers(told: _Metrics | None) -> dict[str, Any] | None:
    if not told:
        return None
    cut = {state: told.get(f"cut.{state}") for state in _STATES}
    return {name: told.get(name) for name in ("max_new_tokens", "longer_references")} | {"cut": cut}


def _means(clients: Mapping[str, _Metrics], weights: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    kinds = _kinds(name for metrics in clients.values() for name in metrics)
    return {kind: {state: _mean(clients, f"{kind}.{state}", weights) for state in _STATES} for kind in kinds}


def _kinds(metrics: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds of scores among names of the form ``SCORE.STATE``."""
    return kinds_in({name.partition(".")[0] for name in metrics})


def _mean(clients: Mapping[str, _Metrics], score: str, weights: Mapping[str, float]) -> float | None:
    """Return a mean over the clients that have this score; None if there are none, or one is not finite."""
    values = {name: metrics[score] for name, metrics in clients.items() if score in metrics}
    known = {name: value for name, value in values.items() if value is not None}
    if not known or len(known) < len(values):
        return None
    return sum(weights[n] * v for n, v in known.items()) / sum(weights[n] for n in known)


def not_finite(metrics: _Metrics) -> dict[str, str]:
    """Return state -> why it has no score.

    Args:
        metrics: One client's scores by ``SCORE.STATE``; None where a score is not finite.
    """
    found = [kind_and_state.partition(".") for kind_and_state, value in metrics.items() if value is None]
    states = dict.fromkeys(state for kind, _, state in found if kind in (*SCORES, *REWARDS))
    return dict.fromkeys(states, _BASE if "zero_shot" in states else _TRAINING)


def not_finite_of(scores: Mapping[State, Scores]) -> dict[str, str]:
    """Return state -> why it has no score, from one client's scores by state."""
    return not_finite({f"{kind}.{s}": value for s, its in scores.items() for kind, value in its.metrics().items()})


def score_text(rouge_l: float | None, nll: float | None, accuracy: float | None = None) -> str:
    """Return ``ROUGE-L (NLL)`` as tables show it, with a dash for a number that is missing or not finite.

    On preference rows the accuracy of rewards follows, in percent.
    """
    shown = ("-" if value is None else f"{value:.{digits}f}" for value, digits in ((rouge_l, 1), (nll, 2)))
    text = "-" if rouge_l is None and nll is None else "{} ({})".format(*shown)
    return text if accuracy is None else f"{text} {accuracy:.0f}%"


def scores_text(scores: Mapping[str, Mapping[str, Any]], state: str) -> str:
    """Return ``score_text`` of a state of a summary's client or mean."""
    return score_text(scores["rouge_l"][state], scores["nll"][state], scores.get("reward_accuracy", {}).get(state))


def scores_title(has_pairs: bool) -> str:
    """Return what the numbers of ``score_text`` are."""
    return "ROUGE-L (NLL) reward accuracy" if has_pairs else "ROUGE-L (NLL)"


def _parameters(rounds: Iterable[RoundLog], group: str) -> int:
    """Return the largest number of a group's parameters that a client has trained in a round."""
    counts = (metrics[f"{group}_parameters"] for log in rounds for metrics in log.clients.values())
    return int(max(counts, default=0))


def traffic(rounds: Iterable[RoundLog]) -> dict[str, Any]:
    """Return the bytes of rounds: means over the messages with weights, totals, and means by group of tensors."""
    logs = list(rounds)
    up = [(size, log.declared["uplink"].get(name, 0)) for log in logs for name, size in log.uplink.items()]
    down = [(size, log.declared["downlink"].get(name, 0)) for log in logs for name, size in log.downlink.items()]
    return {
        "uplink_per_client_per_round": mean_with_weights(up),
        "downlink_per_client_per_round": mean_with_weights(down),
        "replies_with_weights": sum(1 for _, payload in up if payload),
        "uplink_total": sum(size for size, _ in up),
        "downlink_total": sum(size for size, _ in down),
        "evaluation_total": sum(sum(sizes.values()) for log in logs for sizes in log.evaluation.values()),
        "keys_total": sum(sum(log.secure.get(way, {}).values()) for log in logs for way in ("uplink", "downlink")),
        "personal_sent": sum(log.personal_sent for log in logs),
        "groups": {way: mean_groups(log.groups[way] for log in logs) for way in ("uplink", "downlink")},
    }
