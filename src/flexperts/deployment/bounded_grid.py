"""Flower's grid of a deployed run, with a bound on every reply; one that is too large or unreadable is an error.

Flower's own grid reads a reply of any size, and raises what reading raises: one silo could end the run of all.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import wraps
from threading import Lock
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from flexperts.communication.traffic import CHUNK
from flexperts.errors import one_line

_HEAD = 1 << 10
"""Bytes that a piece of an array may have besides its values."""
_POLL = 3.0
"""Seconds between two looks for replies, as in Flower's grid."""
_UNREADABLE = 1
_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    DecodeError,
)
"""What reading a damaged reply raises; errors of the network are others."""


class BoundedGrid(Grid):
    """A grid that pulls replies one by one, so that a bad one is that silo's alone.

    Args:
        grid: Flower's grid.
        most: Bytes that a reply may have.
    """

    def __init__(self, grid: Grid, most: int) -> None:
        self._grid = grid
        self._questions: dict[str, Message] = {}
        _bound_pulls(grid, most)

    def set_run(self, run: Any) -> None:
        """Pass it on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Run information."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Pass it on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are online."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and return their ids; one that cannot be sent has none."""
        sent = list(messages)
        del messages
        ids = list(self._grid.push_messages(sent))
        for message_id, message in zip(ids, sent, strict=False):
            message.content = RecordDict()  # the weights in it
            if message_id:
                self._questions[message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come; one that cannot be read is an error of that silo."""
        return [reply for message_id in message_ids for reply in self._replies_to(message_id)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies that came within so many seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        waiting = [message_id for message_id in self.push_messages(messages) if message_id]
        del messages
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            for message_id in list(waiting):
                found = self._replies_to(message_id)
                replies += found
                if found:
                    waiting.remove(message_id)
            if waiting:
                time.sleep(_POLL)
        for message_id in waiting:
            del self._questions[message_id]
        return replies

    def _replies_to(self, message_id: str) -> list[Message]:
        try:
            found = list(self._grid.pull_messages([message_id]))
        except _FAULTS as error:
            reason = one_line(f"its reply cannot be read ({error!r})")
            found = [Message(Error(_UNREADABLE, reason), reply_to=self._questions[message_id])]
        if found:
            self._questions.pop(message_id, None)
        return found


def _bound_pulls(grid: Grid, most: int) -> None:
    """Let a grid of Flower's refuse a message of more than so many bytes with a ValueError while it is pulled.

    Flower has no setting for it: this replaces the function by which the grid's module pulls a message's objects.
    """
    module: Any = sys.modules[type(grid).__module__]
    pull: Callable[..., dict[str, bytes]] = getattr(module.pull_objects, "__wrapped__", module.pull_objects)

    @wraps(pull)
    def bounded(
        object_ids: Iterable[str], pull_object_fn: Callable[[str], bytes], **settings: Any
    ) -> dict[str, bytes]:
        size, lock = 0, Lock()  # Flower pulls in several threads

        def one(object_id: str) -> bytes:
            nonlocal size
            content = pull_object_fn(object_id)
            added = _size_of(content)
            with lock:
                size += added
                if size > most:
                    raise ValueError(f"it has more than {most:,} bytes")
            return content

        return pull(object_ids=object_ids, pull_object_fn=one, **settings)

    module.pull_objects = bounded


def _size_of(content: bytes) -> int:
    """Return the bytes that an encoded object adds to its message.

    An array lists its pieces by number, and can list one of them many times: each time counts.
    """
    head, _, body = content.partition(b"\0")
    if head.startswith(b"ArrayChunk ") and len(body) > CHUNK + _HEAD:
        raise ValueError(f"it has an array in pieces of more than {CHUNK:,} bytes")
    repeated = 0
    if head.startswith(b"Array "):
        pieces = json.loads(body)["arraychunk_ids"]
        repeated = CHUNK * (len(pieces) - len(set(pieces)))
    return len(content) + repeated
