"""Flower's ClientApp: a thin relay between messages and ``Client``."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flexperts.communication.messages import check_manifest, info_of, records, vector_of
from flexperts.communication.traffic import personal_bytes
from flexperts.errors import PrivacyError
from flexperts.federation.resident import resident_client

app = ClientApp()


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Tell the server who this client is; one client is asked for the initial shared weights."""
    client = resident_client(context)
    vector, table = client.join()
    info = client.describe(table)
    wanted = vector if info_of(message)["send_initial"] else None
    return Message(records(info, {}, wanted), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round and send the shared weights back."""
    client = resident_client(context)
    manifest = client.model.manifest
    check_manifest(message, manifest, client.name)
    vector = vector_of(message, manifest.size, "server")
    trained = client.train(vector, int(info_of(message)["round"]))
    update = trained.update
    metrics = dict(update.metrics) | {"rows": update.rows}
    content = records({"client": client.name}, metrics, update.vector)
    leaked = personal_bytes(content, trained.split.personal)
    if leaked:
        raise PrivacyError(f"{client.name}: {leaked} personal bytes", "no personal byte is sent", "report this bug")
    content.metric_records["metrics"]["personal_sent"] = leaked
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score model states on the client's own test rows; only the scores are sent."""
    client = resident_client(context)
    manifest = client.model.manifest
    check_manifest(message, manifest, client.name)
    scores = client.evaluate(vector_of(message, manifest.size, "server"), info_of(message)["states"])
    client.write_predictions(scores)
    metrics = {f"{kind}.{state}": getattr(s, kind) for state, s in scores.items() for kind in ("rouge_l", "nll")}
    rows = next(iter(scores.values())).rows
    return Message(records({"client": client.name}, metrics | {"rows": rows}), reply_to=message)
