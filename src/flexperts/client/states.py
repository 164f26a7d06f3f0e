"""A client's model in one state after another, from one load of its stored state where the states allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from flexperts.client.request import Request
from flexperts.methods.kit.candidates import MIXTURES
from flexperts.methods.kit.method import OnBatch
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.store import load_personal

if TYPE_CHECKING:
    from flexperts.client.client import Client

InState = Callable[[str], AbstractContextManager[tuple[Turn, OnBatch | None]]]
"""Sets the model up in a state inside a block; yields what ``Client.turn_in`` yields."""


@contextmanager
def in_states(client: Client, request: Request) -> Iterator[InState]:
    """Yield a function that sets the model up in one state at a time; the method's own states share one turn.

    Args:
        client: The client.
        request: The finished global model.
    """
    with ExitStack() as opened:
        shared: Turn | None = None

        @contextmanager
        def enter(state: str) -> Iterator[tuple[Turn, OnBatch | None]]:
            nonlocal shared
            if shared is None or state not in client.method.states:
                opened.close()
                shared = None
            if state == "chosen":
                state = client.choice(request)["chosen"]
            if state == "local":
                load_personal(
                    client.alone.store.path, base=client.model.base.fingerprint
                )  # no new one in its place
                with client.alone.turn_in(client.alone_request(), "personalized") as found:
                    yield found
                return
            turn = shared or opened.enter_context(client.in_use(request))
            mixture = client.method.mixed(turn, MIXTURES[state]) if state in MIXTURES else None
            shared = None if mixture else turn  # a mixture ends its turn
            # Other states are the method's own; it refuses none.
            with mixture or client.method.in_state(turn, state) as on_batch:  # type: ignore[arg-type]
                yield turn, on_batch

        yield enter
