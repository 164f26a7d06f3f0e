"""Flower's grid of a deployed run, with a bound on every reply; one that is too large or unreadable is an error.

Flower's own grid reads a reply of any size, and raises what reading raises: one silo could end the run of all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from flexperts.engines.flower_private import Run, bound_pulls, without_content
from flexperts.errors import one_line

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
        bound_pulls(grid, most)

    def set_run(self, run: Run) -> None:
        """Pass it on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
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
        """Pass it on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass it on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies that came within so many seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        sent = list(messages)
        del messages
        waiting = {
            message_id: sent[at] for at, message_id in enumerate(self._grid.push_messages(sent)) if message_id
        }
        waiting = {message_id: without_content(message) for message_id, message in waiting.items()}
        del sent  # the weights in it
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            for message_id, question in list(waiting.items()):
                found = self._replies_to(message_id, question)
                replies += found
                if found:
                    del waiting[message_id]
            if waiting:
                time.sleep(_POLL)
        return replies

    def _replies_to(self, message_id: str, question: Message) -> list[Message]:
        try:
            return list(self._grid.pull_messages([message_id]))
        except _FAULTS as error:
            reason = one_line(f"its reply cannot be read ({error!r})")
            return [Message(Error(_UNREADABLE, reason), reply_to=question)]
