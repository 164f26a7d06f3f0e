"""What the server holds of a run between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from flexperts.parameters.vector import Payload
from flexperts.seeding import generator


@dataclass
class Server:
    """The state that a method's server side works on; all of it is in the run's checkpoint.

    Args:
        shared: The global shared weights.
        clients: Client name -> train rows, for all clients of the run.
        reports: Client name -> what the method's ``report`` said of it.
        agreement: What the method's ``agree`` made of the reports.
        round: Finished rounds.
        memory: The method's own tensors, such as moments.
        seed: The run's seed.
        base: Fingerprint of the base that the clients have; empty where it is not known.
    """

    shared: Payload
    clients: Mapping[str, int]
    reports: Mapping[str, Any] = field(default_factory=dict)
    agreement: Any = None
    round: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    base: str = ""

    def generator(self, *purpose: str | int) -> Generator:
        """Return a random stream of the server's own."""
        return generator(self.seed, "server", *purpose)
