"""Silos that answer from a few lines instead of a model, on a grid that loses, changes and holds back messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.average import weighted_mean
from flexperts.communication.messages import Update, info_of, payload_of, records
from flexperts.config.run import RunConfig
from flexperts.engines.flower_private import Run, assume_identity, empty_run, stamp
from flexperts.methods.kit.server_state import Server
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload, Vector
from flexperts.seeding import generator
from flexperts.server.checkpoint import load_server
from flexperts.server.exchange import NODE_UNAVAILABLE
from flexperts.server.serve import serve

LORA = "base_model.model.layers.0.q_proj"
START = Payload.of({f"{LORA}.lora_A.weight": torch.full((2, 3), 0.5), f"{LORA}.lora_B.weight": torch.zeros(3, 2)})
BASE = "ba5e" * 16
FOUR = ("method.name=fedavg", "federation.rounds=4", "federation.deadline=50")
SHARING = ("method.name=flex", "graft.sharing=shared", "federation.rounds=4")
Fault = Callable[[Message, Message], list[Message]]
"""Takes a request and its reply, returns what arrives."""


@dataclass
class Silo:
    """A silo without a model: its training adds a draw that depends on its name and the round."""

    name: str
    rows: int
    base: str = BASE
    report: Any = None
    received: dict[int, Vector] = field(default_factory=dict)

    def change(self, number: int) -> Vector:
        """Return what a round's training adds."""
        drawn = torch.randn(START.size, generator=generator(7, self.name, number))
        return np.asarray(drawn.numpy(), dtype=np.float32)

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Return the right answer to a request."""
        return {"query.join": self._join, "query.initial": self._initial}.get(kind, self._round)(kind, content)

    def _join(self, kind: str, content: RecordDict) -> RecordDict:
        told = {"client": self.name, "base": self.base, "train_rows": self.rows, "report": json.dumps(self.report)}
        return records(told, {})

    def _initial(self, kind: str, content: RecordDict) -> RecordDict:
        told = {"client": self.name, "split": "[]", "digest": START.digest("[]")}
        return records(told, {}, START if info_of(content)["weights"] else None)

    def _round(self, kind: str, content: RecordDict) -> RecordDict:
        info, payload = info_of(content), payload_of(content, "server")
        number = int(info["round"])
        heading = {"client": self.name, "round": number}
        if kind == "evaluate":
            scores = {
                f"{k}.{state}": float(min(self.rows, 100)) for state in info["states"] for k in ("nll", "rouge_l")
            }
            return records(heading, scores | {"rows": 2})
        self.received[number] = payload.vector.copy()
        sizes = {"shared_parameters": START.size, "personal_parameters": 0}
        measured = {"loss": 1.5, "steps": 1, "tokens": 9, "rows": self.rows, "personal_sent": 0, **sizes}
        trained = Payload(payload.manifest, payload.vector + np.resize(self.change(number), payload.size))
        return records(heading | {"base": self.base}, measured, trained)


class ScriptedGrid(Grid):
    """Walks over messages twice and returns a list in the wrong order, as Flower's own grid may.

    Args:
        silos: Who is online; a silo's name decides its node, as its key does in a deployed run.
    """

    def __init__(self, *silos: Silo) -> None:
        assume_identity(1)
        self.nodes: dict[int, Silo] = {}
        self.faults: dict[tuple[str, int, str], Fault] = {}
        self.late: list[Message] = []
        self.timeouts: list[float | None] = []
        self.asked: list[tuple[str, str]] = []
        for silo in silos:
            self.enter(silo)

    def enter(self, silo: Silo, node: int | None = None) -> int:
        """Bring a silo online."""
        node = node or self._node_of(silo.name)
        self.nodes[node] = silo
        return node

    def _node_of(self, name: str) -> int:
        """Return a silo's node: 101 for a, 102 for b, ..., the same in every grid; for others one that is free."""
        own = 101 + ord(name[0]) - ord("a")
        return own if len(name) == 1 and own not in self.nodes else 101 + len(self.nodes)

    def leave(self, name: str) -> Silo:
        """Take a silo offline."""
        node = next(n for n, silo in self.nodes.items() if silo.name == name)
        return self.nodes.pop(node)

    def set_run(self, run: Run) -> None:
        """Keep nothing."""

    @property
    def run(self) -> Run:
        return empty_run(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)[::-1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        for message in messages:
            stamp(message)
        self.timeouts.append(timeout)
        arrived, self.late = self.late, []
        for message in messages:
            arrived += self._answers(message)
        return arrived[::-1]

    def _answers(self, message: Message) -> list[Message]:
        silo = self.nodes[message.metadata.dst_node_id]
        kind = message.metadata.message_type
        self.asked.append((kind, silo.name))
        number = int(info_of(message.content).get("round", 0))
        reply = Message(silo.answer(kind, message.content), reply_to=message)
        stamp(reply)
        fault = self.faults.get((kind, number, silo.name))
        return [reply] if fault is None else fault(message, reply)


def drop(request: Message, reply: Message) -> list[Message]:
    """Nothing arrives."""
    return []


def dead(request: Message, reply: Message) -> list[Message]:
    """What the SuperLink answers for a node that has died: an error from node 1."""
    return _of_superlink(request, 3)


def unreachable(request: Message, reply: Message) -> list[Message]:
    """The same once it has sent no heartbeat for a minute."""
    return _of_superlink(request, NODE_UNAVAILABLE)


def _of_superlink(request: Message, code: int) -> list[Message]:
    error = Message(Error(code, "Node Unavailable"), reply_to=request)
    error.metadata.__dict__["_src_node_id"] = 1
    return [error]


def changed(
    info: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    payload: Callable[[Payload], Payload] | None = None,
    without: Iterable[str] = (),
) -> Fault:
    """Return a fault that changes parts of a reply; ``without`` names records and fields to leave out."""

    def fault(request: Message, reply: Message) -> list[Message]:
        content = reply.content
        texts = {**info_of(content), **(info or {})}
        numbers: dict[str, Any] = {**content.metric_records.get("metrics", {}), **(metrics or {})}
        sent = payload_of(content, "silo") if content.array_records else None
        sent = payload(sent) if payload and sent else sent
        made = records(*({n: v for n, v in f.items() if n not in without} for f in (texts, numbers)), sent)
        for record in set(without) & {"info", "metrics", "shared"}:
            del made[record]
        return [answered(request, made)]

    return fault


def answered(request: Message, content: RecordDict) -> Message:
    """Return a reply with a content."""
    reply = Message(content, reply_to=request)
    stamp(reply)
    return reply


class Watch(Observer):
    """Remembers what it was told, and changes the world when a round has ended."""

    def __init__(self, **after: Callable[[], Any]) -> None:
        self.after = after
        self.refusals: list[tuple[str, str]] = []
        self.stages: list[str] = []
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def refused(self, client: str, reason: str) -> None:
        self.refusals.append((client, reason))

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def round(self, record: Mapping[str, Any]) -> None:
        self.after.get(f"round_{record['number']}", lambda: None)()


def run_on(
    grid: ScriptedGrid, config: RunConfig, folder: Path, observer: Observer | None = None
) -> tuple[Server, list[dict[str, Any]]]:
    """Serve a run, or take it up; return the server's last state and the rounds."""
    run = RunDirectory.create_or_resume(folder, config.to_toml())
    serve(grid, config, run, observer or Observer())
    return load_server(run.checkpoint), run.rounds()


def mean_of(shared: Vector, number: int, silos: Iterable[Silo]) -> Vector:
    """Return what a round of these silos, and no other, makes of the shared weights."""
    ordered = sorted(silos, key=lambda silo: silo.name)
    return weighted_mean(
        Update(s.name, Payload(START.manifest, shared + s.change(number)), s.rows, {}) for s in ordered
    )


def expected(rounds: Iterable[Iterable[Silo]], start: Vector = START.vector) -> Vector:
    """Return the shared weights after rounds of these silos."""
    for number, silos in enumerate(rounds, 1):
        start = mean_of(start, number, silos)
    return start


def trio() -> tuple[Silo, Silo, Silo]:
    return Silo("a", 3), Silo("b", 5), Silo("c", 7)


def bits(server: Server) -> bytes:
    return server.shared.vector.tobytes()


def losses(*values: float) -> dict[str, list[float]]:
    return {"layer": list(values)}


class StopError(Exception):
    """Ends a run as a kill would."""


def stopped(config: RunConfig, out: Path, *silos: Silo, after: int = 2) -> None:
    """Leave a run that was killed after a round."""

    def stop() -> None:
        raise StopError

    with pytest.raises(StopError):
        run_on(ScriptedGrid(*silos), config, out, Watch(**{f"round_{after}": stop}))
