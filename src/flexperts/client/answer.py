"""A client's answers to each kind of request; the same in one process and in a silo's worker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import get_args

from flwr.app import RecordDict

from flexperts.client.client import Client
from flexperts.client.request import Request
from flexperts.communication.messages import info_of, payload_of, records
from flexperts.communication.traffic import personal_bytes
from flexperts.errors import FederationError, PrivacyError, incompatible
from flexperts.methods.kit.method import State


def answer(kind: str, content: RecordDict, client: Client) -> RecordDict:
    """Return a client's answer to a request.

    Args:
        kind: One of ``ANSWERS``.
        content: The request's content.
        client: The client that is asked.
    """
    return ANSWERS[kind](content, client)


def _join(content: RecordDict, client: Client) -> RecordDict:
    """Send the client's introduction to the server."""
    return records(client.join(), {})


def _initial(content: RecordDict, client: Client) -> RecordDict:
    """Send the shared weights that round 1 starts from; the server asks one client."""
    payload, texts = client.initial(json.loads(info_of(content)["agreement"]))
    return records({"client": client.name, **texts}, {}, payload)


def _train(content: RecordDict, client: Client) -> RecordDict:
    """Train one round and send what the method shares."""
    request = checked_request(content, client)
    trained = client.train(request)
    update = trained.update
    info = {"client": client.name, "round": request.round, "base": client.model.base.fingerprint}
    reply = records(info, dict(update.metrics) | {"rows": update.rows}, update.payload, trained.sent.packed)
    leaked = personal_bytes(reply, trained.split.personal, *trained.sent.hidden)
    if leaked:
        raise PrivacyError(f"{client.name}: {leaked} personal bytes", "no personal byte is sent", "report this bug")
    reply.metric_records["metrics"]["personal_sent"] = leaked
    return reply


def _evaluate(content: RecordDict, client: Client) -> RecordDict:
    """Score model states on the client's own rows; only the scores are sent."""
    info, request = info_of(content), checked_request(content, client)
    client.settle(request)
    scores = client.evaluate(request, info["states"], answers=info["answers"])
    client.write_routing(request, info["states"])
    metrics: dict[str, float | int] = {
        f"{kind}.{state}": math.nan if value is None else value
        for state, its in scores.items()
        for kind, value in its.metrics().items()
    }
    if info["answers"]:
        client.write_predictions(scores)
        metrics |= client.answer_counts(scores)
    rows = next(iter(scores.values())).rows
    return records({"client": client.name, "round": request.round}, metrics | {"rows": rows})


def request_of(content: RecordDict) -> Request:
    """Return a train or evaluate message as a ``Request``."""
    info = info_of(content)
    if type(info["round"]) is not int:
        raise incompatible(f"round {info['round']!r}", "it must be a whole number")
    return Request(payload_of(content, "server"), json.loads(info["agreement"]), info["round"])


def checked_request(content: RecordDict, client: Client) -> Request:
    """Return a train or evaluate message as a ``Request``; refuse rounds and states that the run does not have.

    A state of a round far ahead would replace the client's stored states, and every real round would be refused.
    """
    request, rounds = request_of(content), client.config.federation.rounds
    last = rounds + client.method.extra_rounds(rounds)
    if not 1 <= request.round <= last:
        rule = f"this run has rounds 1 to {last}"
        raise FederationError(f"round {request.round}", rule, "resume the run from its own directory")
    if odd := [state for state in info_of(content).get("states", ()) if state not in get_args(State)]:
        raise incompatible(f"model state {odd[0]!r}", f"states are {', '.join(get_args(State))}")
    return request


ANSWERS: Mapping[str, Callable[[RecordDict, Client], RecordDict]] = {
    "query.join": _join,
    "query.initial": _initial,
    "train": _train,
    "evaluate": _evaluate,
}
"""Flower's message type -> the function that answers it."""
