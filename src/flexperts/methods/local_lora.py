"""Attention LoRA trained by each client alone: what a silo reaches without a federation."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from flexperts.methods.base import Method, State


class LocalLoRA(Method):
    """Each client alone, with a LoRA of its own.

    Source: no paper; the bound that a federation has to beat for a silo to join it.
    Client i minimises its own f_i(theta_i) over all rounds; nothing couples the clients.
    Trained: attention LoRA. Sent: nothing. Aggregated: nothing. Stays: attention LoRA. Inference: the client's own
    LoRA.
    Open choices: the LoRA is personal, so its rate is ``training.personal_lr`` where that is set, and rounds cut
    training only where AdamW starts afresh, as for every method. ``local`` is this bound with FLEx's graft.
    """

    name = "local_lora"
    summary = "attention LoRA trained on the client's own rows; nothing is sent"
    source = "bound; no paper"
    sends = "nothing"
    keeps = "attention LoRA"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")
    additive = False

    def shared(self, names: Collection[str]) -> set[str]:
        """Nothing is shared."""
        return set()
