"""Flower's Grid inside one process: clients take turns on one resident base, replies stream one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flexperts.federation.flower_private import Run, assume_identity, empty_run, stamp

_RUN_ID = 1


class InProcessGrid(Grid):
    """Runs an unchanged ClientApp for each message, in the order of node ids.

    Replies are produced lazily: a strategy that adds them up as it iterates holds one reply at a time. An exception
    in a client goes through to the caller: in one process there is nobody else to tell.

    Args:
        client_app: The app that answers messages.
        node_configs: Node id -> that node's configuration.
        run_config: Flower's run configuration, given to every node.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Mapping[int, UserConfig],
        run_config: UserConfig,
    ) -> None:
        assume_identity(_RUN_ID)
        self._app = client_app
        self._run = empty_run(_RUN_ID)
        self._contexts = {
            node: Context(
                run_id=_RUN_ID,
                node_id=node,
                node_config=config,
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node, config in sorted(node_configs.items())
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Take over run information."""
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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        pushed = {stamp(message): message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run the clients that these messages went to, one by one, and yield their replies."""
        pulled = [self._waiting.pop(i) for i in message_ids if i in self._waiting]
        for message in sorted(pulled, key=lambda m: m.metadata.dst_node_id):
            yield self._deliver(message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Deliver messages in the order given, each when its reply is asked for. Nothing can time out."""
        for message in messages:
            stamp(message)
            yield self._deliver(message)

    def _deliver(self, message: Message) -> Message:
        reply = self._app(message=message, context=self._contexts[message.metadata.dst_node_id])
        stamp(reply)
        return reply
