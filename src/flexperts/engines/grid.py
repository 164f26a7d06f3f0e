"""Flower's Grid on one machine: replies come one at a time, in the order of the requests."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message, RecordDict

from flexperts.engines.flower_private import Run, assume_identity, empty_run, stamp
from flexperts.server.exchange import LazyGrid

_RUN_ID = 1
Answer = Callable[[str, RecordDict], RecordDict]
"""Function from a request's kind and content to the reply's content."""
Ahead = Callable[[str, RecordDict], None]
"""Function that begins what an answer can begin with while another one is computed."""


class LocalGrid(LazyGrid):
    """A grid whose nodes are on this machine and always answer.

    Replies are produced lazily and in the order of the requests: a strategy that adds them up as it iterates holds
    few replies at a time. An exception in a client reaches the caller.

    Args:
        nodes: The nodes' ids.
    """

    def __init__(self, nodes: Iterable[int]) -> None:
        assume_identity(_RUN_ID)
        self._run = empty_run(_RUN_ID)
        self._ids = sorted(nodes)
        self._waiting: dict[str, Message] = {}

    @abstractmethod
    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the replies to messages in their order; each message is taken when its client is next."""

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
        return list(self._ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        pushed = {stamp(message): message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies to these messages, by node."""
        pulled = [self._waiting.pop(i) for i in message_ids if i in self._waiting]
        yield from self.replies(sorted(pulled, key=lambda m: m.metadata.dst_node_id))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the replies in the order of the messages. Nothing can time out."""
        yield from self.replies(_stamped(messages))


class InProcessGrid(LocalGrid):
    """A grid that calls a node's answer function for each message, when the caller reads the reply.

    Args:
        nodes: Node id -> its answer function.
        ahead: Node id -> the function that is called while the node before it computes; each message is then made
            one turn earlier.
    """

    def __init__(self, nodes: Mapping[int, Answer], ahead: Mapping[int, Ahead] | None = None) -> None:
        super().__init__(nodes)
        self._nodes, self._ahead = nodes, ahead

    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the replies to messages in their order, one by one."""
        if self._ahead is None:
            yield from map(self._deliver, messages)
            return
        coming = iter(messages)
        message = next(coming, None)
        while message is not None:
            if (following := next(coming, None)) is not None:
                self._ahead[following.metadata.dst_node_id](following.metadata.message_type, following.content)
            yield self._deliver(message)
            message = following

    def _deliver(self, message: Message) -> Message:
        answer = self._nodes[message.metadata.dst_node_id]
        return reply_to(message, answer(message.metadata.message_type, message.content))


def _stamped(messages: Iterable[Message]) -> Iterator[Message]:
    for message in messages:
        stamp(message)
        yield message


def reply_to(message: Message, content: RecordDict) -> Message:
    """Return the reply to a message."""
    reply = Message(content, reply_to=message)
    stamp(reply)
    return reply
