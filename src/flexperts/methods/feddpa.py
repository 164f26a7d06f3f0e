"""FedDPA-T and FedDPA-F: a global and a local adapter, weighted for every input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flexperts.communication.schema import Count
from flexperts.config.run import RunConfig
from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import Example
from flexperts.errors import FederationError
from flexperts.methods.kit.local_steps import untrained
from flexperts.methods.kit.method import Method, OnBatch, State
from flexperts.methods.kit.personal_rounds import PersonalRounds
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.modeling.forward import autocast, hidden_states
from flexperts.parts.part import uniform_matrix
from flexperts.training.local import LocalSettings, TrainResult, joined

_INSTANCES = "instances"


class FedDPA(Method):
    """Base of FedDPA-T and FedDPA-F: a global adapter g that is sent, a local adapter l that stays."""

    source = "Yang et al., NeurIPS 2024, arXiv 2403.19211"
    keeps = "a second attention LoRA"
    has_personal_lora = True
    settles = True
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")

    class Options(Method.Options):
        """Weights of the two adapters, in training and at inference."""

        mix: float = Field(0.5, ge=0, le=1)
        """a, weight of the local adapter while it trains; the global adapter has 1 - a."""
        lam: float = Field(0.5, ge=0)
        """lambda, factor of the similarity that weights the local adapter at inference."""
        instances: int = Field(5, ge=1)
        """S, number of train rows to which an input is compared."""

    options: Options

    def turns(self, config: RunConfig) -> int:
        """Return twice a client's rounds: it trains g and l."""
        return 2 * config.federation.turns()

    @torch.no_grad()
    def receive(self, turn: Turn) -> None:
        """Load g; an untrained l gets an A drawn for this client."""
        super().receive(turn)
        if not untrained(turn):
            return
        stream = turn.site.generator("local adapter")
        for name, parameter in turn.split.personal.items():
            if ".lora_A." in name:
                parameter.copy_(uniform_matrix(parameter.size(0), parameter.size(1), stream))

    def personalize(self, turn: Turn, settings: LocalSettings | None = None) -> TrainResult:
        """Train l in a fixed mixture with g; g is frozen."""
        with turn.site.lora.use(shared=1 - self.options.mix, personal=self.options.mix):
            return turn.fit(shared=False, settings=settings)

    def settle(self, turn: Turn) -> dict[str, Tensor]:
        """Return h(x_s) ``[S, D]`` of the drawn train rows."""
        return {_INSTANCES: InstanceWeights(turn, self.options.lam, self.options.instances).own}

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Weight both adapters for every row of every batch in the personalized state."""
        with ExitStack() as stack:
            on_batch = stack.enter_context(super().in_state(turn, state))
            yield stack.enter_context(self.mixed(turn, 1.0)) if state == "personalized" else on_batch

    @contextmanager
    def mixed(self, turn: Turn, weight: float) -> Iterator[OnBatch | None]:
        """Weight both adapters for every row of every batch, with a share of the local adapter's weight."""
        weights = InstanceWeights(turn, weight * self.options.lam, self.options.instances)
        try:
            yield weights
        finally:
            weights.close()


class InstanceWeights:
    """The weights of both adapters, from an input's similarity to the client's rows; called before every batch.

        alpha(x) = lam * mean_s cos(h(x), h(x_s))        y = W0 x + (1 - alpha) dW_g x + alpha dW_l x

    h is the last layer's hidden state of the prompt's last token with l alone; x_s are S of the client's train
    prompts, drawn once per client. While l is untrained, alpha is 0: there is nothing to weight against g.

    Args:
        turn: The client's turn; its model is in use until ``close``.
        lam: lambda.
        instances: ``S``.
    """

    def __init__(self, turn: Turn, lam: float, instances: int) -> None:
        self.turn, self.lam = turn, 0.0 if untrained(turn) else lam
        self.stack = ExitStack()
        self.own = turn.settled[_INSTANCES] if turn.settled else self._of_rows(instances)

    def _of_rows(self, instances: int) -> Tensor:
        """Return h(x_s), ``[S, D]``."""
        site = self.turn.site
        drawn = torch.randperm(len(site.examples), generator=site.generator("instances"))[:instances].tolist()
        return self.hidden(_prompts([site.examples[i] for i in drawn], site.pad_token_id))

    def __call__(self, batch: PaddedBatch) -> None:
        """Switch to the weights of a batch of prompts, row by row."""
        self.close()
        alpha = self.alpha(batch)
        self.stack.enter_context(self.turn.site.lora.use(shared=1 - alpha, personal=alpha))

    def alpha(self, batch: PaddedBatch) -> Tensor:
        """Return the local adapter's weight for every row, ``[B]``."""
        return self.lam * F.cosine_similarity(self.hidden(batch)[:, None], self.own[None], dim=-1).mean(1)

    @torch.no_grad()
    def hidden(self, batch: PaddedBatch) -> Tensor:
        """Return ``[B, D]`` fp32; rows are padded on the left, so the last column is every prompt's last token."""
        lora = self.turn.site.lora
        device = next(lora.base.parameters()).device
        with lora.use(personal=1.0), autocast(device, self.turn.settings.precision):
            return hidden_states(lora.base, batch.input_ids, batch.attention_mask)[:, -1].float()

    def close(self) -> None:
        """Remove the last batch's weights."""
        self.stack.close()


def _prompts(examples: Sequence[Example], pad_token_id: int) -> PaddedBatch:
    return pad_batch([Example(e.prompt, e.prompt_length) for e in examples], pad_token_id)


class FedDPAF(PersonalRounds, FedDPA):
    """FedAvg on a global LoRA; then each client trains a local LoRA with it, once.

    Source: Yang et al., NeurIPS 2024 (arXiv 2403.19211), FedDPA-F, with its official code.
    Rounds 1..R: g <- sum_i p_i g_i, g_i by steps on W0 + dW_g, p_i = n_i / n (FedAvg). dW = s B A.
    Then one more round: l_i <- steps on W0 + a dW_l + (1 - a) dW_g, g final and fixed.
    Inference as FedDPA-T: y = W0 x + (1 - alpha) dW_g x + alpha dW_l x, alpha = lam mean_s cos(h(x), h(x_s)).
    Before the last round l is untrained and alpha is 0: personalized = global.
    Trained: the global LoRA g in rounds 1..R, the local LoRA l in round R+1. Sent: g in rounds 1..R, nothing in the
    last. Aggregated: mean of A and of B by rows. Stays: l. Inference: personalized = the weighted sum above, one
    alpha per row, for generation and for scores; global = g alone.
    Open choices: those of feddpa_t (weights reversed and bypassed in the released code, x_s, no clamp). The source
    names no number of steps for l: ours is those of R x participation rounds, which is how often a client takes
    part, with a separate learning-rate schedule, so that both variants cost about the same. In the extra round all
    clients train, even if only a share is sampled per round: each needs its l. The server gets R from the clients'
    reports, which must agree. As l trains in one round, ``training.personal_moments = "kept"`` has no effect.
    """

    additive = False
    personal_once = True

    name = "feddpa_f"
    summary = "FedAvg, then a local LoRA trained with the finished global one, weighted by each input's similarity"
    budget_note = "twice FedAvg's steps: the local LoRA takes as many as a client's rounds, in one more round"
    report_type: ClassVar[Any] = Count

    def extra_rounds(self, rounds: int) -> int:
        """Return 1: one round follows the recipe's."""
        return 1

    def report(self, site: Site) -> int:
        """Return the recipe's number of rounds."""
        return site.config.federation.rounds

    def agree(self, reports: Mapping[str, int]) -> int:
        """Return the number of rounds in the clients' recipes."""
        rounds = set(reports.values())
        if len(rounds) != 1:
            raise FederationError(
                f"federation.rounds = {sorted(rounds)}",
                "all clients must use one recipe",
                "give all silos the same recipe",
            )
        return rounds.pop()

    def train(self, turn: Turn) -> TrainResult:
        """Train g in the recipe's rounds, l in the extra one."""
        federation = turn.site.config.federation
        if turn.round <= federation.rounds:
            return turn.fit(personal=False)
        steps = federation.turns() * turn.settings.steps
        warmup = round(turn.settings.training.warmup_ratio * steps)
        settings = replace(turn.settings, steps=steps, first_step=0, total_steps=steps, warmup_steps=warmup)
        return self.personalize(turn, settings)

    def is_extra(self, server: Server) -> bool:
        """Return whether all rounds of the clients' recipes are finished."""
        return server.round >= int(server.agreement)


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
    the formula. In its default batched mode, it generates answers before it sets the weights, so they have no
    effect. We follow the formula, on every batch. The code averages clients uniformly; ours is by rows. x_s are
    prompts without responses, drawn once per client (all rows if it has fewer than S). alpha is not clamped: a
    negative cosine gives l a negative weight, and lam above 1 can give g a negative weight. As long as a client has
    not trained l, its alpha is 0, so that personalized = global. h is taken after the
    final norm, as transformers returns it. l starts from an A drawn for the client and B = 0. From round 2 on a
    round has twice FedAvg's steps.
    """

    name = "feddpa_t"
    summary = "a global and a local LoRA, trained in turn every round, weighted by each input's similarity"
    budget_note = "twice FedAvg's steps from round 2: the local LoRA takes as many as the global one"

    def train(self, turn: Turn) -> TrainResult:
        """Train l with the received g, then g alone; in round 1 g is untrained, so l does not train."""
        if turn.round == 1:
            return turn.fit(personal=False)
        half = turn.settings.timed(0.5)
        first = self.personalize(turn, half)
        return joined(first, turn.fit(personal=False, settings=half))
