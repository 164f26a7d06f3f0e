"""Flower's Grid inside one process: clients use one resident base in turn, replies come one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message, RecordDict

from flexperts.engines.flower_private import Run, assume_identity, empty_run, stamp
from flexperts.server.exchange import LazyGrid

_RUN_ID = 1
Answer = Callable[[str, RecordDict], RecordDict]
"""Function from a request's kind and content to the reply's content."""


class InProcessGrid(LazyGrid):
    """A grid that calls a node's answer function for each message.

    Replies are produced lazily: a strategy that adds them up as it iterates holds one reply at a time. An exception
    in a client reaches the caller.

    Args:
        nodes: Node id -> its answer function.
    """

    def __init__(self, nodes: Mapping[int, Answer]) -> None:
        assume_identity(_RUN_ID)
        self._run = empty_run(_RUN_ID)
        self._nodes = dict(sorted(nodes.items()))
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run information."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all node ids, sorted."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        pushed = {stamp(message): message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run the clients that have these messages, one by one, and yield their replies."""
        pulled = [self._waiting.pop(i) for i in message_ids if i in self._waiting]
        for message in sorted(pulled, key=lambda m: m.metadata.dst_node_id):
            yield self._deliver(message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Deliver messages in the given order, each when the caller reads its reply. Nothing can time out."""
        for message in messages:
            stamp(message)
            yield self._deliver(message)

    def _deliver(self, message: Message) -> Message:
        answer = self._nodes[message.metadata.dst_node_id]
        reply = Message(answer(message.metadata.message_type, message.content), reply_to=message)
        stamp(reply)
        return reply
