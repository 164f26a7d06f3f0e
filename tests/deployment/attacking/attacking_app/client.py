"""The attacking ClientApp; ``probe`` is copied beside it from tests/attacks."""

from __future__ import annotations

import json
from multiprocessing.connection import Client

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from attacking_app import probe

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    told = json.loads(message.content["told"]["json"])
    told["files"] += [str(value) for value in context.node_config.values()]
    found = probe.tried(told)
    with Client(str(context.node_config["socket"]), family="AF_UNIX") as connection:
        connection.send_bytes(b"give me the rows")
        found["worker"] = repr(connection.recv_bytes())
    return Message(RecordDict({"found": ConfigRecord({"json": json.dumps(found)})}), reply_to=message)
