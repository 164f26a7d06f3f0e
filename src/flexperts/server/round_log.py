"""The server's record of one round: a line of ``rounds.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexperts.communication.traffic import group_bytes, payload_bytes
from flexperts.errors import FederationError
from flexperts.parameters.vector import Manifest

_ANSWERS = ("max_new_tokens", "longer_references", "cut")
"""First words of the metrics about answers that are not scores."""


@dataclass
class RoundLog:
    """The server's measurements of one round.

    Args:
        number: The round, from 1.
        clients: Client -> loss, steps, tokens, rows as it reported them; clients whose update was used.
        uplink: Client -> encoded bytes that it sent; clients whose update was used.
        downlink: Client -> encoded bytes sent to it.
        declared: Direction -> client -> payload bytes that the method declares.
        groups: Direction -> client -> group of tensors -> payload bytes.
        evaluation: Direction -> client -> encoded bytes of the evaluation.
        personal_sent: Personal bytes that clients found in their own encoded messages.
        scores: Client -> metrics of its evaluation, in rounds that evaluate; None where one is not finite.
        answers: Client -> longest answer in tokens, number of longer references, cut answers by state; in rounds
            that generate answers.
        seconds: Wall time in seconds of training and evaluation.
        participants: Clients drawn to train.
        refused: Client, or node without a valid name -> why its message was not used.
        missing: Participants that sent nothing.
        unscored: Client -> why it has no scores, in rounds that evaluate.
        joined: Clients that joined or returned before this round.
        left: Clients that left before this round.
        privacy: The guarantee of differential privacy after this round; None without noise.
        capped: Client -> rows that its update counted for, if those were fewer than it reported.
        secure: Of the exchanges that secure aggregation adds: their number, encoded bytes by direction and client,
            and seconds; the L2 norm of the mean update; ``spoilt``, why the sum was not used. Empty without.
        late: Client -> rounds that ended between its request and its update, if any did.
        clock: Simulated seconds from the start of the run to the end of this round's training; 0 where clients are
            on other machines.
        planned: The run's planned number of rounds when this one began; the learning rate's cosine is over it.
            0 in rounds of earlier versions.
        total: The same with the method's extra rounds. 0 in rounds of earlier versions.
    """

    number: int
    clients: dict[str, dict[str, float | int]] = field(default_factory=dict)
    uplink: dict[str, int] = field(default_factory=dict)
    downlink: dict[str, int] = field(default_factory=dict)
    declared: dict[str, dict[str, int]] = field(default_factory=lambda: {"uplink": {}, "downlink": {}})
    groups: dict[str, dict[str, dict[str, int]]] = field(default_factory=lambda: {"uplink": {}, "downlink": {}})
    evaluation: dict[str, dict[str, int]] = field(default_factory=lambda: {"uplink": {}, "downlink": {}})
    personal_sent: int = 0
    scores: dict[str, dict[str, float | int | None]] = field(default_factory=dict)
    answers: dict[str, dict[str, float | int | None]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "evaluation": 0.0})
    participants: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unscored: dict[str, str] = field(default_factory=dict)
    joined: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    privacy: dict[str, Any] | None = None
    capped: dict[str, int] = field(default_factory=dict)
    secure: dict[str, Any] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    clock: float = 0.0
    planned: int = 0
    total: int = 0

    def declare(self, direction: str, client: str, manifest: Manifest) -> None:
        """Record the sizes of a client's payload, as the method declares them."""
        self.groups[direction][client] = group_bytes(manifest)
        self.declared[direction][client] = payload_bytes(manifest)

    def withdraw(self, client: str) -> None:
        """Remove what an update brought, which is not used after all."""
        for table in (self.clients, self.uplink, self.declared["uplink"], self.groups["uplink"]):
            table.pop(client, None)

    def score(self, client: str, metrics: Mapping[str, float | int | None]) -> None:
        """Record the metrics of a client's evaluation."""
        about = {name: value for name, value in metrics.items() if name.partition(".")[0] in _ANSWERS}
        self.scores[client] = {name: value for name, value in metrics.items() if name not in about}
        if about:
            self.answers[client] = about

    def check_quorum(self, share: float) -> None:
        """Raise ``FederationError`` if fewer than a share of the participants have sent a usable update."""
        count = len(self.participants)
        least = max(1, math.ceil(share * count - 1e-9)) if count else 0
        if len(self.clients) >= least:
            return
        refused = [f"{name} refused ({reason})" for name, reason in self.refused.items()]
        faults = [*(f"{name} missing" for name in self.missing), *refused]
        sent = f"{len(self.clients)} of {count} clients sent a usable update"
        raise FederationError(
            f"round {self.number}: {sent} ({', '.join(faults)})",
            f"federation.quorum = {share:g} asks for {least}",
            "resume the run when the clients are back, remove those that stay away with `flexperts forget`, or "
            "start a new run with a lower federation.quorum",
        )

    def close_evaluation(self, clients: Iterable[str], training: Collection[str]) -> None:
        """Record why clients that should be scored have no scores.

        Args:
            clients: Those that should be.
            training: Those that were not asked because they train.
        """
        for name in clients:
            if name not in self.scores and name not in self.unscored:
                absent = "it is training" if name in training else "it was not online"
                asked = name in self.evaluation["downlink"]
                self.unscored[name] = "it did not answer in time" if asked else absent
        self.unscored = {name: reason for name, reason in self.unscored.items() if name not in self.scores}

    def refuse(self, client: str, reason: str) -> None:
        """Record why a message was not used; a client can have several reasons."""
        before = self.refused.get(client)
        self.refused[client] = f"{before}; {reason}" if before else reason
