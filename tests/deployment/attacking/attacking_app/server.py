"""The attacking ServerApp: it asks every SuperNode once and writes what they found."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    told = str(context.run_config["told"])
    while len(nodes := list(grid.get_node_ids())) < json.loads(told)["nodes"]:
        time.sleep(0.5)
    content = RecordDict({"told": ConfigRecord({"json": told})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in nodes], timeout=120)
    found = [
        f"error: {reply.error.reason}" if reply.has_error() else reply.content["found"]["json"] for reply in replies
    ]
    Path(str(context.run_config["out"])).write_text(json.dumps(found), encoding="utf-8")
