"""What a server asks a silo, and ways to ask it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict, UserConfig

from flexperts.communication.messages import info_of, payload_of, records
from flexperts.deployment import listening, relay
from flexperts.engines.flower_private import assume_identity, stamp

RUN = "0123456789abcdef" * 2
BAD_RUNS = [
    "",
    ".",
    "..",
    "../x",
    "/etc",
    "0" * 31,
    "0" * 33,
    "A" * 32,
    "g" * 32,
    f"{'0' * 32}\n",
    f"../{'0' * 29}",
]
Ask = Callable[[str, RecordDict], RecordDict]


def converse(ask: Ask) -> dict[str, RecordDict]:
    """Ask a silo what a server asks in one round, and return its answers by kind."""
    answers = {"query.join": ask("query.join", records({}))}
    report = json.loads(info_of(answers["query.join"])["report"])
    agreement = json.dumps({"clinic": report})
    answers["query.initial"] = ask("query.initial", records({"agreement": agreement}))
    payload = payload_of(answers["query.initial"], "clinic")
    request = {"round": 1, "agreement": agreement}
    answers["train"] = ask("train", records(request, payload=payload))
    states = {"states": ["zero_shot", "global", "personalized"], "answers": True}
    answers["evaluate"] = ask("evaluate", records(request | states, payload=payload))
    return answers


@contextmanager
def serving(state: Path, answer: Callable[[Any], bytes], most: int = 1 << 30) -> Iterator[None]:
    """Serve a state folder from a thread inside the block, with any function in the worker's place."""

    def until_told(request: bytes | None) -> bytes:
        if request == b"stop":
            raise SystemExit
        return answer(request)

    def loop(door: Listener) -> None:
        with suppress(SystemExit):
            listening.serve_requests(door, until_told, most)

    with listening.listening(state) as door:
        thread = threading.Thread(target=loop, args=(door,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            if thread.is_alive():
                say(state, b"stop")
            thread.join(timeout=60)
            assert not thread.is_alive()


def say(state: Path, request: bytes) -> bytes | None:
    """Send bytes to the socket of a state folder and return what comes back; None when the other side hangs up."""
    with Client(str(state / "worker.sock"), family="AF_UNIX") as connection:
        connection.send_bytes(request)
        try:
            if not connection.poll(120):
                raise TimeoutError("no reply")
            return connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return None


def through_relay(silo_file: Path, recipe: str) -> Ask:
    """Return a node's answer: its SuperNode runs Flower's ClientApp on each message."""
    assume_identity(1)
    config: UserConfig = {"silo": str(silo_file)}
    context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={"recipe": recipe})

    def answer(kind: str, content: RecordDict) -> RecordDict:
        message = Message(content, 1, kind)
        stamp(message)
        return relay.app(message=message, context=context).content

    return answer
