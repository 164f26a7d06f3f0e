"""Every name of Flower that is not public by Flower's own rule, in one place.

``tests/contract`` holds what is used here against the Flower that is installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["CHUNK", "Run", "assume_identity", "bound_pulls", "empty_run", "stamp", "without_content"]

_SERVER_NODE_ID = 1
_HEAD = 1 << 10
"""Bytes that an object's head may have besides its content."""


def assume_identity(run_id: int) -> None:
    """Let this process build messages as the server of ``run_id``; Message() refuses to otherwise."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, _SERVER_NODE_ID, 1


def empty_run(run_id: int) -> Run:
    """Return run information that says nothing but the id."""
    return Run.create_empty(run_id)


def stamp(message: Message) -> str:
    """Give a message an id, as the SuperLink would, and return it."""
    message_id = uuid4().hex
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def without_content(message: Message) -> Message:
    """Return a message with the same id, receiver and kind, and nothing in it."""
    told = message.metadata
    bare = Message(RecordDict(), told.dst_node_id, told.message_type, group_id=told.group_id)
    bare.metadata.__dict__["_message_id"] = told.message_id
    return bare


def bound_pulls(grid: Grid, most: int) -> None:
    """Let a grid of Flower's refuse a message of more than so many bytes with a ValueError while it is pulled.

    A message is a tree of objects. An array lists its chunks by number, and can list one chunk many times, so what
    the list makes of them counts too.
    """
    module: Any = sys.modules[type(grid).__module__]
    pull: Callable[..., dict[str, bytes]] = getattr(module.pull_objects, "__wrapped__", module.pull_objects)

    @wraps(pull)
    def bounded(
        object_ids: Iterable[str], pull_object_fn: Callable[[str], bytes], **settings: Any
    ) -> dict[str, bytes]:
        size = 0

        def one(object_id: str) -> bytes:
            nonlocal size
            content = pull_object_fn(object_id)
            size += _size_of(content)
            if size > most:
                raise ValueError(f"it has more than {most:,} bytes")
            return content

        return pull(object_ids=object_ids, pull_object_fn=one, **settings)

    module.pull_objects = bounded


def _size_of(content: bytes) -> int:
    """Return the bytes that an encoded object adds to its message."""
    head, _, body = content.partition(b"\0")
    if head.startswith(b"ArrayChunk ") and len(body) > CHUNK + _HEAD:
        raise ValueError(f"it has an array in pieces of more than {CHUNK:,} bytes")
    repeated = 0
    if head.startswith(b"Array "):
        chunks = json.loads(body)["arraychunk_ids"]
        repeated = CHUNK * (len(chunks) - len(set(chunks)))
    return len(content) + repeated
