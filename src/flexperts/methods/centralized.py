"""All rows in one place: the upper bound that a federation tries to come near."""

from __future__ import annotations

from collections.abc import Sequence

from flexperts.methods.base import Method
from flexperts.methods.server import Server


class Centralized(Method):
    """One LoRA trained on all clients' rows together. Nobody could have it: it needs what silos may not share.

    Source: no paper; the bound without federation.
    One trainer minimises sum_i (n_i / n) f_i(theta) by batches drawn from all rows, n_i being client i's rows.
    Trained: attention LoRA, by one trainer in the first client's seat. Sent: its LoRA, to the server and to all
    clients for evaluation. Aggregated: nothing, there is one update. Stays: nothing. Inference: that LoRA.
    Open choices: the trainer takes as many steps per round as all clients together, so it sees each row as often as
    they do; ``federation.participation`` is not used. Its bytes are those of one seat, not a federation's, and the
    rows that would have to travel are not in them.
    """

    name = "centralized"
    summary = "one attention LoRA on all clients' rows pooled: a bound that nobody could have"
    source = "bound; no paper"
    pools_rows = True

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Only the first client takes part; it stands for whoever would hold all rows."""
        return [min(server.clients)]
