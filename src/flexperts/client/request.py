"""What a client is asked with, and what its training leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexperts.communication.messages import Update
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import Payload
from flexperts.protection.pipeline import Outgoing


@dataclass(frozen=True)
class Request:
    """What the server asks a client with.

    Args:
        payload: The weights that came along.
        agreement: What the server made of all clients' reports.
        round: The round to train; for an evaluation, the last one that is finished.
    """

    payload: Payload
    agreement: Any
    round: int


@dataclass(frozen=True)
class Trained:
    """What a round of training leaves for the reply.

    Args:
        update: What the server gets.
        split: The parameters it came from, by which the reply's encoding is checked.
        sent: How the update leaves.
    """

    update: Update
    split: ParameterSplit
    sent: Outgoing
