"""What a SuperNode uploads is pulled within a bound, and one that cannot be read is that silo's error alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid import HttpGrid, http_grid

from flexperts.communication.messages import info_of, records
from flexperts.communication.traffic import CHUNK
from flexperts.deployment import bounded_grid
from flexperts.deployment.bounded_grid import BoundedGrid
from flexperts.engines.flower_private import assume_identity, empty_run, stamp
from flexperts.server.exchange import error_of

MIB = 1 << 20
Change = Callable[[bytes], bytes]


class SuperLink:
    """Flower's Runtime API: it stores what nodes upload, without reading it."""

    def __init__(self, change: Change = lambda content: content, values: int = 10) -> None:
        self.change, self.values = change, values
        self.objects: dict[str, bytes] = {}
        self.replies: dict[str, Any] = {}
        self.fails = False

    def PushMessages(self, request: Any) -> Any:  # noqa: N802
        return http_grid.PushAppMessagesResponse(message_ids=[m.metadata.message_id for m in request.messages_list])

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        if self.fails:
            raise httpx.ConnectError("gone")
        (asked,) = request.message_ids
        message, tree = self.replies[asked]
        return http_grid.PullAppMessagesResponse(messages_list=[message], message_object_trees=[tree])

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        from flwr.proto.message_pb2 import PullObjectResponse

        content = self.objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        pass

    def answer(self, question: Message, *, honest: bool) -> None:
        """Store a node's reply to a message; one that is not honest is changed on its way."""
        node = question.metadata.dst_node_id  # equal objects would be one
        content = records({"client": "b", "node": node}, {"node": node})
        values = np.full(self.values, node, np.float32)
        content["shared"] = ArrayRecord({f"shared{node}": Array(values)})
        reply = Message(content, reply_to=question)
        stamp(reply)
        objects = get_all_nested_objects(reply)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        change = (lambda encoded: encoded) if honest else self.change
        self.objects |= {name: change(one.deflate()) for name, one in objects.items()}
        bare = Message(RecordDict(), reply_to=question)
        bare.metadata.__dict__["_message_id"] = reply.object_id
        self.replies[question.metadata.message_id] = (message_to_proto(bare), get_object_tree(reply))


def in_arrays(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return a change of the table of every array."""

    def changed(content: bytes) -> bytes:
        head, _, body = content.partition(b"\0")
        if not head.startswith(b"Array "):
            return content
        table = json.loads(body)
        kind, children, _ = head.split(b" ")
        new = json.dumps(change(table)).encode()
        return b" ".join([kind, children, str(len(new)).encode()]) + b"\0" + new

    return changed


def body(kind: bytes, new: bytes) -> Change:
    def changed(content: bytes) -> bytes:
        head, _, _ = content.partition(b"\0")
        name, children, _ = head.split(b" ")
        return b" ".join([name, children, str(len(new)).encode()]) + b"\0" + new if name == kind else content

    return changed


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    assume_identity(1)
    monkeypatch.setattr(bounded_grid, "_POLL", 0.01)
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)


def exchanged(link: Any, most: int = MIB) -> list[Message]:
    """Ask three nodes, of which the second is not honest, and return their replies."""
    grid = HttpGrid(token="x")
    grid.set_run(empty_run(1))
    grid._client = link
    questions = [Message(records({"run": "r"}), node, "train") for node in (101, 102, 103)]

    def answered(run_id: int, messages: Any) -> list[str]:
        for message in messages:
            link.answer(message, honest=message.metadata.dst_node_id != 102)
        return [message.metadata.message_id for message in messages]

    grid._try_push_messages = answered  # type: ignore[method-assign]
    return BoundedGrid(grid, most).send_and_receive(questions, timeout=5)


def test_honest_replies_arrive() -> None:
    replies = exchanged(SuperLink())
    assert [info_of(reply.content)["node"] for reply in replies] == [101, 102, 103]
    for node, reply in zip((101, 102, 103), replies, strict=True):
        assert reply.content.array_records["shared"][f"shared{node}"].numpy().tolist() == [node] * 10


UPLOADS: dict[str, Change] = {
    "no JSON": body(b"Array", b"{"),
    "a list": body(b"Array", b"[]"),
    "no such chunk": in_arrays(lambda table: table | {"arraychunk_ids": [7]}),
    "chunks of another type": in_arrays(lambda table: table | {"arraychunk_ids": {"a": 1}}),
    "no shape": in_arrays(lambda table: {n: v for n, v in table.items() if n != "shape"}),
    "one chunk many times": in_arrays(lambda table: table | {"arraychunk_ids": [0] * 1000}),
    "texts that are none": body(b"ConfigRecord", b"\xff\xff"),
    "numbers that are none": body(b"MetricRecord", b"\xff\xff"),
    "no message": body(b"Message", b"\xff"),
    "a record of nothing": body(b"RecordDict", b"3"),
    "an unknown type": lambda content: content.replace(b"ArrayRecord ", b"Nothing "),
    "no head": lambda content: b"x",
    "two megabytes": lambda content: content + b"x" * 2 * MIB,
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_an_upload_that_cannot_be_read_is_one_silo_s_error(kind: str) -> None:
    replies = exchanged(SuperLink(UPLOADS[kind]))
    by_node = {reply.metadata.src_node_id: reply for reply in replies}
    assert sorted(by_node) == [101, 102, 103]
    reason = error_of(by_node[102])
    assert reason is not None
    assert "its reply cannot be read" in reason
    assert reason.isprintable()
    if kind == "two megabytes":
        assert "it has more than 1,048,576 bytes" in reason
    assert [info_of(by_node[node].content)["client"] for node in (101, 103)] == ["b", "b"]


def test_pieces_larger_than_flower_makes_are_refused() -> None:
    def larger(content: bytes) -> bytes:
        return content + b"x" * (CHUNK + MIB) if content.startswith(b"ArrayChunk ") else content

    replies = exchanged(SuperLink(larger), most=100 * MIB)
    (reason,) = [error_of(reply) for reply in replies if reply.has_error()]
    assert reason is not None
    assert "in pieces of more than" in reason


def test_equal_chunks_of_an_honest_array_are_taken() -> None:
    """15 MiB of one value are some chunks, of which most are one object."""
    link = SuperLink(values=15 * MIB // 4)
    replies = exchanged(link, most=20 * MIB)
    assert [reply.has_error() for reply in replies] == [False] * 3


def test_a_network_that_is_gone_is_no_silo_s_fault() -> None:
    link = SuperLink()
    link.fails = True
    with pytest.raises(httpx.ConnectError):
        exchanged(link)
