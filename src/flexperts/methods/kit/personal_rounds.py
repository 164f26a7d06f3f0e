"""Extra rounds after the recipe's, in which every client trains its personal part on the final shared weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.vector import Manifest, Payload


class PersonalRounds(Method):
    """Base of methods whose extra rounds train the personal part alone; no weights are sent back in them.

    All clients take part in these rounds, even if only a share is sampled in the others: each has a personal part.
    """

    def is_extra(self, server: Server) -> bool:
        """Return whether the coming round is an extra one."""
        return server.round >= server.rounds and self.extra_rounds(server.rounds) > 0

    def sends_weights(self, server: Server) -> bool:
        """Return False in extra rounds."""
        return not self.is_extra(server)

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return nothing in extra rounds."""
        return super().outgoing(turn) if turn.round <= turn.site.config.federation.rounds else {}

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Return the sampled clients; all clients in extra rounds."""
        return sorted(server.clients) if self.is_extra(server) else super().participants(server, sampled)

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare nothing in extra rounds."""
        return Payload.empty().manifest if self.is_extra(server) else super().uplink(server, client)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Combine the updates; in extra rounds only read them, so that all clients train."""
        if not self.is_extra(server):
            self.combine(server, updates)
            return
        for _ in updates:
            pass

    def combine(self, server: Server, updates: Iterable[Update]) -> None:
        """Combine the updates of one of the recipe's rounds; by default their mean by rows."""
        super().aggregate(server, updates)
