"""One exchange of messages over any grid: the sender of a reply, and the error that it reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from flexperts.communication.messages import info_of
from flexperts.errors import FederationError, one_line

NODE_UNAVAILABLE = 5
"""Flower's code of the error."""


class LazyGrid(Grid):
    """A grid whose nodes are all online from the start; it makes each reply when the caller reads it."""


class Asked:
    """The requests of one exchange.

    A reply is matched to a node by the message that it answers: Flower's own error replies, such as for a node
    that died, are sent by the SuperLink and not by the node.
    """

    def __init__(self) -> None:
        self._sent: dict[int, Metadata] = {}

    def note(self, message: Message) -> Message:
        """Remember a request that is about to be sent, and return it."""
        self._sent[message.metadata.dst_node_id] = message.metadata
        return message

    def node(self, reply: Message) -> int:
        """Return the node whose request a reply answers."""
        answered, sender = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        own = self._sent.get(sender)
        if own is not None and own.message_id == answered:  # the usual case; other requests need no check
            return sender
        found = (node for node, sent in self._sent.items() if answered and sent.message_id == answered)
        return next(found, sender)


def request(content: RecordDict, kind: str, node: int, group: str) -> Message:
    """Return a message to a node; messages of one exchange share the group."""
    return Message(content, node, kind, group_id=group)


def sendable(grid: Grid, messages: Iterator[Message]) -> Iterable[Message]:
    """Return messages in the form that a grid takes: lazy for a lazy grid, else a list.

    In one process, each message is made when its client is next. Flower's own grids iterate more than once.
    """
    return messages if isinstance(grid, LazyGrid) else list(messages)


def error_of(reply: Message) -> str | None:
    """Return the reason in an error reply; None if the reply is not an error."""
    if reply.has_error():
        return one_line(reply.error.reason or "") or f"error {reply.error.code}"
    try:
        told = info_of(reply.content).get("error")
    except (KeyError, TypeError, ValueError):
        return None  # the caller reads the reply next and reports what is wrong with it
    return None if told is None else one_line(told if isinstance(told, str) else "") or "error"


def is_unreachable(reply: Message) -> bool:
    """Return whether this is the SuperLink's reply for a node that it has not heard of for about a minute."""
    return reply.has_error() and reply.error.code == NODE_UNAVAILABLE


def check_no_error(name: str, reply: Message) -> None:
    """Raise a FederationError for an error reply, whether it is the client's or Flower's."""
    if is_unreachable(reply):
        rule = "the SuperLink has not heard of its SuperNode for about a minute"
        raise FederationError(f"{name} cannot be reached", rule, "look at its network and its SuperNode's log")
    if (error := error_of(reply)) is not None:
        raise FederationError(f"{name} answers with an error", error, "see that silo's log")


def check_turn(name: str, reply: Message, wanted: Iterable[str], already: Iterable[str]) -> None:
    """Refuse an error reply, and a client that was not asked or has answered already."""
    check_no_error(name, reply)
    if name not in wanted:
        raise FederationError(f"a reply of {name}", "this client was not asked", "see that silo's log")
    if name in already:
        raise FederationError(f"duplicate: {name} has answered", "the first reply counts", "see that silo's log")
