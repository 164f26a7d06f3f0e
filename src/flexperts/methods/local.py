"""Local training only: FLEx's trained parts, with nothing sent."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from flexperts.methods.base import State
from flexperts.methods.flex import Flex


class Local(Flex):
    """Each client alone, with LoRA and graft of its own.

    Source: the local bound of arXiv 2506.00965's comparison.
    Trained: attention LoRA, personal experts, gate. Sent: nothing. Stays: all of it.
    Inference: the client's own LoRA, experts and gate.
    """

    name = "local"
    summary = "LoRA and graft trained on the client's own rows; nothing is sent"
    sends = "nothing"
    keeps = "attention LoRA, grafted experts and their gate"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")

    def shared(self, names: Collection[str]) -> set[str]:
        """Nothing is shared."""
        return set()
