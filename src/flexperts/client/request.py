"""The server's request to a client, and the result of a client's training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import Payload
from flexperts.protection.pipeline import Outgoing


@dataclass(frozen=True)
class Request:
    """The server's request to a client.

    Args:
        payload: The weights that the server sent.
        agreement: The method's agreement, which the server made from all clients' reports.
        round: The round to train; for an evaluation, the last finished round.
    """

    payload: Payload
    agreement: Any
    round: int


@dataclass(frozen=True)
class Trained:
    """The result of a round of training.

    Args:
        update: The update for the server.
        split: The parameters that were trained.
        private: What the encoded reply is searched for: the personal parameters, and their kept moments.
        sent: The update after clipping, noise and packing.
    """

    update: Update
    split: ParameterSplit
    private: Mapping[str, Tensor]
    sent: Outgoing
