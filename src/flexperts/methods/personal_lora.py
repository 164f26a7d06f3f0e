"""The start of a client's own adapter, for methods that have a second one."""

from __future__ import annotations

from flexperts.methods.turn import Turn


def untrained(turn: Turn) -> bool:
    """Tell whether the client's own adapter is still at its start, where every B is zero."""
    return not any(bool(p.any()) for name, p in turn.split.personal.items() if ".lora_B." in name)
