"""FedSA-LoRA: A is shared, and B is personal."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from torch import Tensor

from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.server_state import Server
from flexperts.modeling.lora import SHARED_PREFIX


class FedSALoRA(Method):
    """A learns what clients have in common and is averaged; B learns what is specific to a client and stays there.

    Source: arXiv 2410.01463 (ICLR 2025).
    W_i = W0 + s B_i A;  A <- sum_i p_i A_i, p_i = n_i / n.  A round starts from the global A and the client's B.
    Trained: A and B of attention LoRA. Sent: A, half of LoRA's bytes. Aggregated: mean by rows.
    Stays: B, kept between rounds (zero until the client has trained).
    Inference: the global A with the client's B. There is no global state and no adapter folder: A alone, with B
    at zero, is the base. The authors report the unweighted mean over clients: `mean` in the summary.
    Open choices: B trains with training.personal_lr, which is training.lr unless it is set, as in the source.
    """

    name = "fedsa_lora"
    summary = "LoRA's A averaged; B personal"
    source = "ICLR 2025, arXiv 2410.01463"
    sends = "A of attention LoRA"
    keeps = "B of attention LoRA"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")

    def shared(self, names: Collection[str]) -> set[str]:
        """Return the names of LoRA's A."""
        return {name for name in names if name.startswith(SHARED_PREFIX) and ".lora_A." in name}

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return nothing: A without a B adapts nothing."""
        return {}
