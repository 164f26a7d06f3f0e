"""FFA-LoRA: A is never trained, so that the mean of B gives the exact mean of the products."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flexperts.communication.messages import DERIVED
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import Payload

_A = ".lora_A."


class FFALoRA(Method):
    """One global LoRA where only B trains; A is random, the same on all clients, and always frozen.

    Source: arXiv 2403.12313 (ICLR 2024).
    W = W0 + s B A;  B <- sum_i p_i B_i, p_i = n_i / n.  sum_i p_i (B_i A) = (sum_i p_i B_i) A, so this is exact.
    Trained: B of attention LoRA. Sent: B, half of LoRA's bytes. Aggregated: mean by rows. Stays: nothing; A is
    frozen.
    Inference: the global B with the common A.
    Open choices: A is uniform as in PEFT's initialization, drawn from the run's seed; the source draws a Gaussian.
    Every client draws A itself. The server needs A for the adapter folder only: the first client sends it once,
    before round 1. The source's differential privacy is not part of this method. With B alone the update's row
    space is fixed, so a larger lora.rank helps: its bytes are those of FedAvg at half that rank.
    """

    name = "ffa_lora"
    summary = "LoRA with A frozen at random; B averaged, which is exact; nothing personal"
    source = "ICLR 2024, arXiv 2403.12313"
    sends = "B of attention LoRA"

    def trains(self, name: str) -> bool:
        """Return True for everything except A."""
        return _A not in name

    def initial(self, split: ParameterSplit) -> Mapping[str, Tensor]:
        """Return the shared B, and A as ``derived.`` values."""
        frozen = {DERIVED + n: p.detach().clone() for n, p in split.frozen.items() if _A in n}
        return {**split.shared, **frozen}

    def start(self, server: Server) -> None:
        """Move A to the server's memory, where rounds do not change it."""
        told = server.shared.tensors()
        server.memory.update({n.removeprefix(DERIVED): t for n, t in told.items() if n.startswith(DERIVED)})
        server.shared = Payload.of({n: t for n, t in told.items() if not n.startswith(DERIVED)})

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return the global B with the common A."""
        return super().adapter(server) | server.memory
