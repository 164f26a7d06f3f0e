"""FedDPA-T: the local adapter trains in every round, before the global one."""

from __future__ import annotations

from flexperts.methods.feddpa import FedDPA
from flexperts.methods.turn import Turn
from flexperts.training.local import TrainResult, joined


class FedDPAT(FedDPA):
    """A global and a local LoRA, trained in turn in every round and weighted for every input.

    Source: Yang et al., NeurIPS 2024 (arXiv 2403.19211), FedDPA-T, with its official code.
    Round t >= 2: l <- steps on W0 + a dW_l + (1 - a) dW_g with g as received and fixed; then, in every round,
    g_i <- steps on W0 + dW_g; g <- sum_i p_i g_i, p_i = n_i / n. dW = s B A.
    At inference y = W0 x + (1 - alpha) dW_g x + alpha dW_l x, alpha = lam mean_{s=1..S} cos(h(x), h(x_s)), h = last
    layer's hidden state of the prompt's last token with l alone, x_s = S of the client's train rows.
    Trained: the local LoRA l (not in round 1), then the global LoRA g, each for the round's steps. Sent: g.
    Aggregated: mean of A and of B by rows. Stays: l. Inference: personalized = the weighted sum above, one alpha
    per row, for generation and for scores; global = g alone.
    Open choices: the released code gives alpha to the global adapter and 1 - alpha to the local one, the reverse of
    the formula, and in its default batched mode answers are generated before the weights are set, so they have no
    effect; we follow the formula, on every batch. It averages clients uniformly, ours is by rows. x_s are prompts
    without responses, drawn once per client (all rows where it has fewer than S). alpha is not clamped: a negative
    cosine gives a negative weight, and lam above 1 may give g one. h is taken after the final norm, as transformers
    returns it. l starts from an A of the client's own and B = 0. From round 2 on a round has twice FedAvg's steps.
    """

    name = "feddpa_t"
    summary = "a global and a local LoRA, trained in turn every round, weighted by each input's likeness"

    def train(self, turn: Turn) -> TrainResult:
        """Train l beside the received g, then g alone; in round 1 g has learnt nothing yet, and l waits."""
        if turn.round == 1:
            return turn.fit(personal=False)
        first = self.personalize(turn)
        return joined(first, turn.fit(personal=False))
