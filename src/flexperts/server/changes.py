"""What the change in an update counts: less if it is late, and per step where clients take different numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from flexperts.communication.average import capped
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server.buffered_rounds import BufferedRounds
from flexperts.server.round_log import RoundLog


class Changes:
    """The changes in the updates of a run's rounds.

    Args:
        config: The run.
        server: Its state.
        buffered: Who trains from which weights, in buffered rounds.
    """

    def __init__(self, config: RunConfig, server: Server, buffered: BufferedRounds | None) -> None:
        self._training = config.training
        self._per_step = config.training.local_seconds is not None
        self._server, self._buffered = server, buffered

    def asked(self, client: str) -> tuple[int, Payload]:
        """Return the round for which a client was asked, and the shared weights that it was sent."""
        if self._buffered is not None:
            return self._buffered.sent(client)
        return self._server.round + 1, self._server.shared

    def factor(self, client: str, log: RoundLog) -> float:
        """Return the factor on a client's change, but for what all have in common."""
        steps = max(1, log.clients[client]["shared_steps"]) if self._per_step else 1
        return self._lateness(client, log.number) / steps

    def capped(self, rows: Mapping[str, int], share: float, number: int) -> dict[str, int]:
        """Return the rows that updates count for, so that none is more than a share of a round's, late as they are.

        Args:
            rows: Client -> its rows.
            share: The largest share.
            number: The round.
        """
        late = {name: self._lateness(name, number) for name in rows}
        counts = {name: count * late[name] for name, count in rows.items()}
        most = dict(zip(rows, capped(list(counts.values()), share), strict=True))
        lowered = {name: max(1, int(most[name] / late[name])) for name in rows if most[name] < counts[name]}
        return {**rows, **lowered}

    def _lateness(self, client: str, number: int) -> float:
        return 1.0 if self._buffered is None else self._buffered.weight(client, number)

    def factors(self, rows: Mapping[str, int], log: RoundLog) -> dict[str, float]:
        """Return the factor on every change.

        Where clients take different numbers of steps, changes count per step of the shared weights, times the mean
        number (FedNova: Wang et al., 2020, https://arxiv.org/abs/2007.07481). A client reports its steps itself, so
        in that mean it has at most those that its rows allow.

        Args:
            rows: Client -> the rows that its update counts for.
            log: The round's record, with the steps.
        """
        mean = 1.0
        if self._per_step and rows:
            most = self._training.steps_per_round
            steps = {name: min(log.clients[name]["shared_steps"], most(count)) for name, count in rows.items()}
            mean = sum(count * steps[name] for name, count in rows.items()) / sum(rows.values())
        return {name: mean * self.factor(name, log) for name in rows}

    def moved(self, update: Update, factor: float) -> Update:
        """Return an update whose change, times a factor, starts from the present shared weights."""
        (_, sent), shared = self.asked(update.client), self._server.shared
        if factor == 1 and sent is shared:
            return update
        change = np.float32(factor) * (update.vector - sent.vector)
        return replace(update, payload=replace(update.payload, vector=shared.vector + change))
