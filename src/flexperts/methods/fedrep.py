"""FedRep: FedPer's split, with the head trained first and the body after it."""

from __future__ import annotations

from pydantic import Field

from flexperts.methods.fedper import FedPer
from flexperts.methods.phases import personal_then_shared
from flexperts.methods.turn import Turn
from flexperts.training.local import TrainResult


class FedRep(FedPer):
    """FedPer's split; in every round first the personal blocks train, then the shared ones.

    Source: Collins et al., ICML 2021 (arXiv 2102.07078), Algorithm 1; PFLlib.
    Round, client i: head_i <- argmin f_i(body, head_i) for some steps, body as received; then
    body_i <- body - steps on f_i(body, head_i), head_i as just trained; body <- sum_i p_i body_i, p_i = n_i / n.
    Trained: attention LoRA of the last m blocks (head), then of the lower blocks (body). Sent: the body.
    Aggregated: mean by rows. Stays: the head. Inference: personalized = global body + own head; global = global
    body alone, the last m blocks as pretrained (their B at zero).
    Open choices: the split is FedPer's mapping to LoRA. The paper trains the head to (near) optimality and the body
    for one step or epoch; here the two phases divide the round's steps, ``head_share`` to the head, so that the
    budget is that of the other methods. Each phase takes at least one step and has its own optimizer and schedule.
    Mean by rows, where the paper's is uniform.
    """

    name = "fedrep"
    summary = "as fedper, but each round trains the personal blocks first and then the shared ones"
    source = "Collins et al., ICML 2021, arXiv 2102.07078"

    class Options(FedPer.Options):
        """Where the model is cut, and how a round's steps are divided."""

        head_share: float = Field(0.5, gt=0, lt=1)
        """Share of each round's steps that trains the personal blocks."""

    def train(self, turn: Turn) -> TrainResult:
        """Train the head against the frozen body, then the body against the frozen head."""
        return personal_then_shared(turn, self.options.head_share)
