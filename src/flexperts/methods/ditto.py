"""Ditto: FedAvg, and a personal model per client that is pulled towards the global one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from flexperts.config.run import RunConfig
from flexperts.methods.kit.local_steps import proximal, untrained
from flexperts.methods.kit.method import Method, OnBatch, State
from flexperts.methods.kit.turn import Turn
from flexperts.modeling.lora import PERSONAL_PREFIX
from flexperts.training.local import LocalSettings, StepHooks, TrainResult, joined


class Ditto(Method):
    """FedAvg on one LoRA; a second, personal LoRA is trained close to it.

    Source: Li et al., ICML 2021 (arXiv 2012.04221), Algorithm 1; PFLlib, FederatedScope.
    Global: w <- sum_i p_i w_i, w_i from w by local steps on f_i, p_i = n_i / n (FedAvg, unchanged by v).
    Personal: v_i <- local steps on f_i(v) + lam/2 ||v - w||^2, w = what the server sent this round.
    w and v are LoRA factors (all A and B of an adapter); f_i(v) computes with v alone.
    Trained: the shared LoRA, then the personal one, each for the round's steps. Sent: the shared LoRA. Aggregated:
    mean by rows. Stays: the personal LoRA. Inference: personalized = v_i alone; global = w.
    Open choices: v starts from the first w that the client receives. The order does not matter to the algorithm; w
    trains first, so that its batches are FedAvg's and w equals FedAvg's bit for bit. v takes as many steps as w
    (twice the compute of FedAvg). The paper's steps are SGD; under AdamW the term enters the gradient before the
    preconditioning, as in PFLlib. The distance is between factors, not between products BA. v is stored as
    (-A, -B), which computes the same: after few steps v and w can be equal, and no byte of v may be in a message.
    """

    name = "ditto"
    summary = "FedAvg, and a personal LoRA trained with a pull towards the global one"
    source = "Li et al., ICML 2021, arXiv 2012.04221"
    keeps = "a second attention LoRA"
    has_personal_lora = True
    budget_note = "twice FedAvg's steps: the personal LoRA takes as many as the shared one"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")

    class Options(Method.Options):
        """Strength of the pull."""

        lam: float = Field(0.1, ge=0)
        """lambda, strength of the pull of v towards w; 0 trains v alone."""

    options: Options

    def turns(self, config: RunConfig) -> int:
        """Return twice a client's rounds: it trains w and v."""
        return 2 * config.federation.turns()

    def receive(self, turn: Turn) -> None:
        """Load w; an untrained v starts from it."""
        super().receive(turn)
        if untrained(turn):
            turn.load(_mirrored(turn.received), turn.split.personal)

    def train(self, turn: Turn) -> TrainResult:
        """Train w as FedAvg does, then v near the w that was received."""
        half = turn.settings.timed(0.5)
        return joined(turn.fit(personal=False, settings=half), self.personalize(turn, half))

    def personalize(self, turn: Turn, settings: LocalSettings | None = None) -> TrainResult:
        """Train v alone near the w that was received."""
        pull = proximal(turn.split.personal, _mirrored(turn.received), self.options.lam)
        with turn.site.lora.use(personal=1.0):
            return turn.fit(shared=False, settings=settings, hooks=StepHooks(penalty=pull))

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Use v instead of w in the personalized state."""
        with ExitStack() as stack:
            on_batch = stack.enter_context(super().in_state(turn, state))
            if state == "personalized":
                stack.enter_context(turn.site.lora.use(personal=1.0))
            yield on_batch

    def mixed(self, turn: Turn, weight: float) -> AbstractContextManager[None]:
        """Return the weighted sum of both adapters' outputs."""
        return turn.site.lora.use(shared=1 - weight, personal=weight)


def _mirrored(received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return w in the form of v: under v's names, with both factors negated, so that BA is the same."""
    return {f"{PERSONAL_PREFIX}{name}": -tensor for name, tensor in received.items()}
