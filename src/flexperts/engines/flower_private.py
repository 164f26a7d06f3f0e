"""Every name of Flower that is not public by Flower's own rule, in one place.

``tests/contract`` holds what is used here against the Flower that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from flwr.app import Message
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "actor_pool", "assume_identity", "empty_run", "stamp"]

_SERVER_NODE_ID = 1


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


def actor_pool(options: Mapping[str, Any], begin: Callable[[], None]) -> Any:
    """Return a pool, empty yet, of the Ray actors in which Flower's simulation runtime runs client apps.

    ``actors_capacity`` is how many fit in the Ray that this process is connected to, at least 1.

    Args:
        options: Ray's options of each actor, such as ``num_cpus`` and ``num_gpus``.
        begin: Called in each actor when it starts.

    Raises:
        ValueError: Not even one fits.
    """
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool, ClientAppActor  # these import Ray

    return BasicActorPool(ClientAppActor, dict(options), {"on_actor_init_fn": begin})
