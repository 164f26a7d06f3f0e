"""One exchange of messages over any grid: whom a reply is from, and what it says went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from flexperts.communication.messages import info_of

_LONGEST = 400


class LazyGrid(Grid):
    """A grid whose nodes are all there from the start, and that makes each reply when it is asked for."""


class Asked:
    """Who was asked in one exchange.

    A reply is put to a node by the message it answers: Flower's own error replies, such as for a node that died,
    come from the SuperLink and not from the node.
    """

    def __init__(self) -> None:
        self._sent: dict[int, Metadata] = {}

    def note(self, message: Message) -> Message:
        """Remember a request that is about to be sent, and return it."""
        self._sent[message.metadata.dst_node_id] = message.metadata
        return message

    def node(self, reply: Message) -> int:
        """Return the node that a reply is about."""
        answered, sender = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        own = self._sent.get(sender)
        if own is not None and own.message_id == answered:  # as ever; nobody else's request needs a look
            return sender
        found = (node for node, sent in self._sent.items() if answered and sent.message_id == answered)
        return next(found, sender)


def request(content: RecordDict, kind: str, node: int, group: str) -> Message:
    """Return a message to a node; what belongs together has one group."""
    return Message(content, node, kind, group_id=group)


def sendable(grid: Grid, messages: Iterator[Message]) -> Iterable[Message]:
    """Return messages as a grid can take them.

    In one process each is made when its client's turn comes; Flower's own grids walk over them more than once.
    """
    return messages if isinstance(grid, LazyGrid) else list(messages)


def error_of(reply: Message) -> str | None:
    """Return the reason that an error reply gives; None where the reply is none."""
    if reply.has_error():
        return one_line(reply.error.reason or "") or f"error {reply.error.code}"
    try:
        told = info_of(reply.content).get("error")
    except (KeyError, TypeError, ValueError):
        return None  # whoever reads on will say what is wrong with it
    return None if told is None else one_line(str(told)) or "error"


def one_line(text: str) -> str:
    """Return a text of any origin as one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
