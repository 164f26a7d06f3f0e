"""What the server writes down of one round: a line of ``rounds.jsonl``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexperts.communication.traffic import group_bytes, payload_bytes
from flexperts.parameters.vector import Manifest

_ANSWERS = ("max_new_tokens", "longer_references", "cut")
"""What is reported of answers beside their scores."""


@dataclass
class RoundLog:
    """What the server measures of one round.

    Args:
        number: The round, from 1.
        clients: What each client whose update was used reported: loss, steps, tokens, rows.
        uplink: Encoded bytes that each of these clients sent.
        downlink: Encoded bytes sent to each client.
        declared: What the method declares for both directions: payload bytes by client.
        groups: The same, divided by group of tensors.
        evaluation: Encoded bytes of the evaluation, both directions, by client.
        personal_sent: Personal bytes that clients found in their own encoded messages.
        scores: Client -> metrics of its evaluation, in rounds that evaluate; None where one is not finite.
        answers: Client -> longest answer in tokens, how many references are longer, answers cut by state, in rounds
            that generate answers.
        seconds: Wall time of training and evaluation.
        participants: Who was drawn to train.
        refused: Client, or node that never got a name -> why a message of its was not used.
        missing: Participants from whom nothing came.
        unscored: Client -> why it has no scores, in rounds that evaluate.
        joined: Clients that came, or came back, before this round.
        left: Clients that went before this round.
        privacy: What differential privacy guarantees after this round; None without noise.
        planned: Rounds that the run was to have in all when this one began, over which the learning rate's cosine
            goes; 0 in rounds of earlier versions.
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
    planned: int = 0

    def declare(self, direction: str, client: str, manifest: Manifest) -> None:
        """Note what a client's payload holds."""
        self.groups[direction][client] = group_bytes(manifest)
        self.declared[direction][client] = payload_bytes(manifest)

    def score(self, client: str, metrics: Mapping[str, float | int | None]) -> None:
        """Note what a client reports of its evaluation."""
        about = {name: value for name, value in metrics.items() if name.partition(".")[0] in _ANSWERS}
        self.scores[client] = {name: value for name, value in metrics.items() if name not in about}
        if about:
            self.answers[client] = about

    def refuse(self, client: str, reason: str) -> None:
        """Note why a message was not used; a client can have more than one."""
        before = self.refused.get(client)
        self.refused[client] = f"{before}; {reason}" if before else reason

    def close_training(self, heard: Collection[str]) -> None:
        """Note who was drawn and is not among those that sent something."""
        self.missing = [name for name in self.participants if name not in heard]
