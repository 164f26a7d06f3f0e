"""FedSVD: as FFA-LoRA, but an SVD of the product after every round gives A orthonormal rows that fit the data."""

from __future__ import annotations

from collections.abc import Iterable

from flexperts.communication.messages import DERIVED, Update
from flexperts.methods.ffa_lora import FFALoRA
from flexperts.methods.kit.ranks import factors, named, truncated
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.vector import Payload


class FedSVD(FFALoRA):
    """One global LoRA where only B trains; the server factors B A again after every round.

    Source: FedSVD (NeurIPS 2025).
    W = W0 + s B A;  B <- sum_i p_i B_i, p_i = n_i / n, exact because A is the same everywhere;
    then B A = U S V^T, A <- V_r^T, B <- U_r S_r, which does not change B A: its rank is at most r = lora.rank.
    Trained: B of attention LoRA. Sent: B up; A and B down. Aggregated: mean by rows, then the SVD. Stays: nothing.
    Inference: the last A and B.
    Open choices: A of round 1 is uniform as in PEFT's initialization, drawn from the run's seed, and B is zero;
    from round 2 on, A has orthonormal rows. The SVD is that of two small triangles from QR decompositions, in
    float64; the largest entry of every row of A is positive. A goes down in every round, also to a client that
    could compute it, because one that missed rounds needs it. A client's reply is linear in B, and A is computed
    from averages of replies: with ``privacy.noise``, noise is on B alone, and is not multiplied by noise on A. With
    ``compression`` what packing lost of B is added to the next round's change as it is, although A has changed.
    """

    name = "fedsvd"
    summary = "LoRA's B averaged, then both factors renewed by an SVD of the product; nothing personal"
    source = "FedSVD, NeurIPS 2025"

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return B, and A as ``derived.`` values, which do not come back."""
        return Payload.of(server.shared.tensors() | {DERIVED + n: t for n, t in server.memory.items()})

    def receive(self, turn: Turn) -> None:
        """Load A into the frozen factor and B into the trained one."""
        As = {n.removeprefix(DERIVED): t for n, t in turn.received.items() if n.startswith(DERIVED)}
        turn.load(As, {n: turn.split.frozen[n] for n in As if n in turn.split.frozen})
        turn.load({n: t for n, t in turn.received.items() if not n.startswith(DERIVED)})

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average B, and factor B A again."""
        super().aggregate(server, updates)
        current = factors(server.shared.tensors() | server.memory)
        new = named({layer: truncated(*pair, pair) for layer, pair in current.items()})
        server.memory |= {name: new[name] for name in server.memory}
        server.shared = Payload.of({name: new[name] for name in server.shared.manifest.names})
