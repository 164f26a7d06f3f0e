"""The server's state of a run between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from flexperts.communication.average import capped_rows
from flexperts.communication.versions import Versions
from flexperts.parameters.vector import Payload
from flexperts.seeding import generator


@dataclass(frozen=True)
class Flight:
    """A client's training that has begun and whose update has not arrived; only buffered rounds keep it.

    Args:
        number: The round that it was asked for.
        since: The simulated clock when it was asked, in seconds.
    """

    number: int
    since: float


@dataclass
class Server:
    """The state that a method reads and writes on the server; the run's checkpoint holds all of it.

    Args:
        shared: The global shared weights.
        clients: Client name -> train rows, for all clients of the run.
        silos: Client name -> silos behind it, for clients that are regions.
        reports: Client name -> the value of the method's ``report``.
        agreement: The value of the method's ``agree``.
        round: Number of finished rounds.
        memory: Tensors that the method keeps, such as moments.
        seed: The run's seed.
        base: Fingerprint of the clients' base; empty if it is not known.
        start: Digest of the initial weights, their tensors and the split, as most clients reported it; empty if it
            is not known.
        nodes: Client -> the node that its name belongs to.
        max_share: Largest share of one client in a mean: ``federation.max_share``, or 1 if all clients are in this
            process. It is not in the checkpoint.
        rounds: Number of the recipe's rounds; a method's extra rounds come after them. It is not in the checkpoint.
        versions: The versions of the shared weights that clients have; None if requests always hold all weights.
        flights: Client -> its training that is under way between two rounds.
        sent: Round -> the shared weights that clients of ``flights`` were sent for it.
        clock: Simulated seconds since the start of the run; 0 where clients are on other machines.
    """

    shared: Payload
    clients: Mapping[str, int]
    reports: Mapping[str, Any] = field(default_factory=dict)
    agreement: Any = None
    round: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    base: str = ""
    start: str = ""
    nodes: dict[str, int] = field(default_factory=dict)
    max_share: float = 1.0
    rounds: int = 0
    versions: Versions | None = None
    flights: dict[str, Flight] = field(default_factory=dict)
    sent: dict[int, Payload] = field(default_factory=dict)
    clock: float = 0.0
    silos: dict[str, int] = field(default_factory=dict)

    @property
    def counted(self) -> dict[str, int]:
        """Client -> the rows that it counts for in means: what it reported, up to ``max_share`` of all rows."""
        return capped_rows(self.clients, self.max_share)

    def forget_departed(self, prefix: str) -> None:
        """Remove from the memory what is there as ``<prefix><client>`` of clients that have left."""
        for name in [n for n in self.memory if n.startswith(prefix)]:
            if name.removeprefix(prefix) not in self.clients:
                del self.memory[name]

    def generator(self, *purpose: str | int) -> Generator:
        """Return a random stream for the server."""
        return generator(self.seed, "server", *purpose)
