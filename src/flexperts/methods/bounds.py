"""The two bounds of every comparison: the untouched base, and one LoRA on all clients' rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar

from flexperts.communication.messages import Update
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.server_state import Server


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


class Centralized(Method):
    """One LoRA trained on all clients' rows together. Nobody could have it: it needs what silos may not share.

    Source: no paper; the bound without federation.
    One trainer minimises sum_i (n_i / n) f_i(theta) by batches drawn from all rows, n_i being client i's rows.
    Trained: attention LoRA, by one trainer in the first client's seat. Sent: its LoRA, to the server and to all
    clients for evaluation. Aggregated: nothing, there is one update. Stays: nothing. Inference: that LoRA.
    Open choices: the trainer takes as many steps per round as all clients together, so it sees each row as often as
    they do; ``federation.participation`` is not used. Its bytes are those of one seat, not a federation's, and the
    rows that would have to travel are not in them.
    """

    name = "centralized"
    summary = "one attention LoRA on all clients' rows pooled: a bound that nobody could have"
    source = "bound; no paper"
    pools_rows = True

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Only the first client takes part; it stands for whoever would hold all rows."""
        return [min(server.clients)]
