"""A method of a user's own, in a module that worker processes can import."""

from __future__ import annotations

from flexperts.methods.fedavg import FedAvg


class Own(FedAvg):
    """FedAvg under another name."""

    name = "own"
