"""Callbacks of a run, in the style of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexperts.observer import Observer, TurnState


class Callback(Observer):
    """Observer with the two events that most callers want; it can override the others of ``Observer`` too.

    Events come as keyword arguments. Later versions may add some, so an override ends with ``**later``. What an
    override raises stops the run after the last whole round; the run can be resumed.
    """

    def on_round_end(self, *, record: Mapping[str, Any], **later: Any) -> None:
        """Handle the end of a round.

        Args:
            record: As a line of rounds.jsonl: ``number``, ``clients`` (loss in nats per token, steps, tokens),
                ``uplink`` and ``downlink`` in bytes, ``seconds``, and ``scores`` where the round was scored.
            later: What later versions add.
        """

    def on_client_end(self, *, client: str, state: TurnState | None, **later: Any) -> None:
        """Handle the end of a client's turn: it has joined, trained a round or evaluated.

        Args:
            client: The client's name.
            state: The last state of its turn, with ``phase``, steps and loss; None if it had nothing to do.
            later: What later versions add.
        """

    def turn(self, state: TurnState) -> None:
        """Remember where the client's turn is."""
        self._turns[state.client] = state

    def turn_ended(self, client: str) -> None:
        """Call ``on_client_end``."""
        self.on_client_end(client=client, state=self._turns.pop(client, None))

    def round(self, record: Mapping[str, Any]) -> None:
        """Call ``on_round_end``."""
        self.on_round_end(record=record)

    @property
    def _turns(self) -> dict[str, TurnState]:
        found: dict[str, TurnState] = self.__dict__.setdefault("_under_way", {})
        return found  # without __init__: subclasses need not call it
