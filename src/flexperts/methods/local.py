"""Local training only: FLEx's trained parts, with nothing sent."""

from __future__ import annotations

from flexperts.methods.base import Method


class Local(Method):
    """Each client alone, with LoRA and graft of its own.

    Source: the local bound of arXiv 2506.00965's comparison.
    Trained: attention LoRA, personal experts, gate. Sent: nothing. Stays: all of it.
    Inference: the client's own LoRA, experts and gate.
    """

    name = "local"
    summary = "LoRA and graft trained on the client's own rows; nothing is sent"
    source = "arXiv 2506.00965"
    grafts = True
    states = ("zero_shot", "personalized")

    def is_shared(self, name: str) -> bool:
        """Nothing is shared."""
        return False
