"""A client's answers to each kind of request; the same in one process and in a silo's worker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import RecordDict

from flexperts.client.client import Client
from flexperts.client.copy import with_weights
from flexperts.client.request import Request
from flexperts.communication.messages import LACKS_COPY, check_records, fields_of, info_of, payload_of, records
from flexperts.communication.schema import (
    AnyFields,
    EvaluateRequest,
    InitialQuery,
    KeysQuery,
    Query,
    TrainRequest,
)
from flexperts.communication.traffic import personal_bytes
from flexperts.errors import FederationError, PrivacyError

_SERVER = "server"
_Asked = TypeVar("_Asked", TrainRequest, EvaluateRequest)


def answer(kind: str, content: RecordDict, client: Client) -> RecordDict:
    """Return a client's answer to a request.

    Args:
        kind: One of ``ANSWERS``.
        content: The request's content.
        client: The client that is asked.
    """
    whole = with_weights(kind, content, client)
    if whole is None:
        return records({"client": client.name, "error": LACKS_COPY})
    content, keep = whole
    reply = answer_whole(kind, content, client)
    keep()
    return reply


def answer_whole(kind: str, content: RecordDict, client: Client) -> RecordDict:
    """Return the same for a request that ``with_weights`` has returned: it has all weights."""
    try:
        return ANSWERS[kind](content, client)
    finally:
        client.observer.turn_ended(client.name)


def read_ahead(kind: str, content: RecordDict, client: Client) -> None:
    """Begin to read what the answer to a request starts with, while another one is computed."""
    if kind in ("train", "evaluate"):
        number = int(info_of(content)["round"])
        client.store.read_ahead(number - 1 if kind == "train" else number)


def _join(content: RecordDict, client: Client) -> RecordDict:
    """Send the client's introduction to the server."""
    asked = _read(content, Query)
    told = client.join()
    if client.masked is not None:
        told["card"] = client.masked.card(asked.run)
    return records(told, {})


def _initial(content: RecordDict, client: Client) -> RecordDict:
    """Send the digest of what round 1 starts from; the weights too, which the server asks of one client."""
    asked = _read(content, InitialQuery)
    payload, split = client.initial(json.loads(asked.agreement))
    told = {"client": client.name, "split": split, "digest": payload.digest(split)}
    return records(told, {}, payload if asked.weights else None)


def _keys(content: RecordDict, client: Client) -> RecordDict:
    """Send keys and encrypted shares for a round with secure aggregation, and shares for the round before."""
    asked = _read(content, KeysQuery)
    if client.masked is None:
        raise FederationError("a request for keys", "this recipe has no secure aggregation", "use one recipe")
    shares = client.masked.shares(asked.unmask) if asked.unmask else ""
    keys = client.masked.keys(asked.setup) if asked.setup else ""
    agreed = client.masked.signature(asked.closed) if asked.closed else ""
    return records({"client": client.name, "keys": keys, "shares": shares, "agreed": agreed}, {})


def _train(content: RecordDict, client: Client) -> RecordDict:
    """Train one round and send what the method shares."""
    request, asked = checked_request(content, TrainRequest, client)
    trained = client.train(request)
    update, packed = trained.update, trained.sent.packed
    if client.masked is not None and update.payload.size:
        packed = client.masked.update(asked.masking, request.round, trained.sent.change, update.rows)
    info = {"client": client.name, "round": request.round, "base": client.model.base.fingerprint}
    reply = records(info, dict(update.metrics) | {"rows": update.rows}, update.payload, packed)
    leaked = personal_bytes(reply, trained.private, *trained.sent.hidden)
    if leaked:
        raise PrivacyError(f"{client.name}: {leaked} personal bytes", "no personal byte is sent", "report this bug")
    reply.metric_records["metrics"]["personal_sent"] = leaked
    return reply


def _evaluate(content: RecordDict, client: Client) -> RecordDict:
    """Score model states on the client's own rows; only the scores are sent."""
    request, asked = checked_request(content, EvaluateRequest, client)
    client.settle(request)
    scores = client.evaluate(request, asked.states, answers=asked.answers)
    client.test_candidates(request, scores)
    client.write_routing(request, asked.states)
    metrics: dict[str, float | int] = {
        f"{kind}.{state}": math.nan if value is None else value
        for state, its in scores.items()
        for kind, value in its.metrics().items()
    }
    if asked.answers:
        client.write_predictions(scores)
        metrics |= client.answer_counts(scores)
    rows = next(iter(scores.values())).rows
    return records({"client": client.name, "round": request.round}, metrics | {"rows": rows})


def request_of(content: RecordDict, schema: type[_Asked]) -> tuple[Request, _Asked]:
    """Return a train or evaluate message as a ``Request``, and its other fields.

    Args:
        content: The message.
        schema: Its schema.
    """
    asked = _read(content, schema)
    return Request(payload_of(content, _SERVER), json.loads(asked.agreement), asked.round), asked


def checked_request(content: RecordDict, schema: type[_Asked], client: Client) -> tuple[Request, _Asked]:
    """Do what ``request_of`` does; refuse a round that the run does not have.

    A state of a round far ahead would replace the client's stored states, and every real round would be refused.
    """
    request, asked = request_of(content, schema)
    last = client.last_round
    if not 1 <= request.round <= last:
        rule = f"this run has rounds 1 to {last}"
        raise FederationError(f"round {request.round}", rule, "resume the run from its own directory")
    return request, asked


def _read(content: RecordDict, schema: type[AnyFields]) -> AnyFields:
    """Return a request's fields by their schema; the server may be another machine."""
    check_records(content, _SERVER, "info")
    return fields_of(content, schema, _SERVER)


ANSWERS: Mapping[str, Callable[[RecordDict, Client], RecordDict]] = {
    "query.join": _join,
    "query.initial": _initial,
    "query.keys": _keys,
    "train": _train,
    "evaluate": _evaluate,
}
"""Flower's message type -> the function that answers it."""
