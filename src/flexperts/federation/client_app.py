"""Flower's ClientApp: a thin relay between messages and ``Client``."""

from __future__ import annotations

import json

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flexperts.communication.messages import info_of, payload_of, records
from flexperts.communication.traffic import personal_bytes
from flexperts.errors import PrivacyError
from flexperts.federation.client import Request
from flexperts.federation.resident import resident_client

app = ClientApp()


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Tell the server who this client is."""
    return Message(records(resident_client(context).join(), {}), reply_to=message)


@app.query("initial")
def initial(message: Message, context: Context) -> Message:
    """Send the shared weights that round 1 starts from; one client is asked."""
    payload, texts = resident_client(context).initial(json.loads(info_of(message)["agreement"]))
    return Message(records(texts, {}, payload), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round and send back what the method shares."""
    client = resident_client(context)
    trained = client.train(_request(message))
    update = trained.update
    metrics = dict(update.metrics) | {"rows": update.rows}
    content = records({"client": client.name}, metrics, update.payload)
    leaked = personal_bytes(content, trained.split.personal)
    if leaked:
        raise PrivacyError(f"{client.name}: {leaked} personal bytes", "no personal byte is sent", "report this bug")
    content.metric_records["metrics"]["personal_sent"] = leaked
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score model states on the client's own rows; only the scores are sent."""
    client, info, request = resident_client(context), info_of(message), _request(message)
    scores = client.evaluate(request, info["states"], answers=info["answers"])
    client.write_routing(request, info["states"])
    if info["answers"]:
        client.write_predictions(scores)
    metrics = {f"{kind}.{state}": value for state, s in scores.items() for kind, value in s.metrics().items()}
    rows = next(iter(scores.values())).rows
    return Message(records({"client": client.name}, metrics | {"rows": rows}), reply_to=message)


def _request(message: Message) -> Request:
    info = info_of(message)
    return Request(payload_of(message, "server"), json.loads(info["agreement"]), int(info["round"]))
