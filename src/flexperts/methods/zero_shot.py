"""The untouched base: the lower bound of every comparison."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar

from flexperts.communication.messages import Update
from flexperts.methods.base import Method, State
from flexperts.methods.server import Server


class ZeroShot(Method):
    """Nobody trains; the pretrained base answers.

    Source: no paper; the bound that every training has to beat.
    Trained: nothing. Sent: nothing. Aggregated: nothing. Stays: nothing. Inference: the base without adapters.
    Open choices: the recipe's rounds pass with no client in them, so that a run has the same files as any other.
    """

    name = "zero_shot"
    summary = "nobody trains: the pretrained base, as a lower bound"
    source = "bound; no paper"
    sends = "nothing"
    states: ClassVar[tuple[State, ...]] = ("zero_shot",)
    additive = False

    def shared(self, names: Collection[str]) -> set[str]:
        """Nothing is shared."""
        return set()

    def trains(self, name: str) -> bool:
        """Nothing trains."""
        return False

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Nobody takes part."""
        return []

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Leave everything as it is; reading the updates is what lets a lazy grid go on."""
        for _ in updates:
            pass
