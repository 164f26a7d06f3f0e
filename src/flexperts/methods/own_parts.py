"""Methods whose clients compute with parts of their own that are nevertheless sent to the server."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from flexperts.methods.base import Method, OnBatch, State
from flexperts.methods.turn import Turn


class OwnParts(Method):
    """Base of methods that send all that trains, and whose global state is attention LoRA on the untouched base."""

    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")
    additive = False

    def shared(self, names: Collection[str]) -> set[str]:
        """Everything that trains is sent."""
        return set(names)

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Only the personalized state has the parts: they are what a client has beyond the global LoRA."""
        with ExitStack() as stack:
            if state == "zero_shot":
                stack.enter_context(turn.site.lora.use())
            for part in turn.parts.values() if state != "personalized" else ():
                stack.enter_context(part.disabled())
            yield None
