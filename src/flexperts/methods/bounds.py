"""The two bounds of every comparison: the untouched base, and one LoRA on all clients' rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar

from flexperts.communication.messages import Update
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.server_state import Server


class ZeroShot(Method):
    """No client trains; the pretrained base answers.

    Source: no paper; the bound that every training has to beat.
    Trained: nothing. Sent: nothing. Aggregated: nothing. Stays: nothing. Inference: the base without adapters.
    Open choices: the recipe's rounds run without clients, so that a run has the same files as any other.
    """

    name = "zero_shot"
    summary = "no training: the pretrained base, as a lower bound"
    source = "bound; no paper"
    sends = "nothing"
    states: ClassVar[tuple[State, ...]] = ("zero_shot",)
    additive = False

    def shared(self, names: Collection[str]) -> set[str]:
        """Return no names: nothing is shared."""
        return set()

    def trains(self, name: str) -> bool:
        """Return False: nothing trains."""
        return False

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Return no clients."""
        return []

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Change nothing; the updates are read because a lazy grid only advances when they are."""
        for _ in updates:
            pass


class Centralized(Method):
    """One LoRA trained on all clients' rows together. Not possible in practice: silos may not share their rows.

    Source: no paper; the bound without federation.
    One trainer minimises sum_i (n_i / n) f_i(theta) by batches drawn from all rows, n_i being client i's rows.
    Trained: attention LoRA, by the first client as the one trainer. Sent: its LoRA, to the server and to all
    clients for evaluation. Aggregated: nothing, because there is one update. Stays: nothing. Inference: that LoRA.
    Open choices: the trainer takes as many steps per round as all clients together, so it sees each row as often as
    they do; ``federation.participation`` is not used. Its bytes are those of one client, not of a federation, and
    do not include the rows that would have to be sent.
    """

    name = "centralized"
    summary = "one attention LoRA on all clients' rows pooled: a bound that is not possible in practice"
    source = "bound; no paper"
    pools_rows = True

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Return the first client alone; it acts as the owner of all rows."""
        return [min(server.clients)]
