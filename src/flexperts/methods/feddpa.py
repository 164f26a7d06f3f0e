"""What FedDPA's two variants share: two adapters, how the local one trains, and the weights of each instance.

The variants are in feddpa_t.py and feddpa_f.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import Example
from flexperts.grafting.part import uniform_matrix
from flexperts.methods import base
from flexperts.methods.base import Method, OnBatch, State
from flexperts.methods.personal_lora import untrained
from flexperts.methods.turn import Turn
from flexperts.modeling.forward import autocast, hidden_states
from flexperts.training.local import LocalSettings, TrainResult

_INSTANCES = "instances"


class FedDPA(Method):
    """Base of FedDPA-T and FedDPA-F: a global adapter g that is sent, a local adapter l that stays."""

    source = "Yang et al., NeurIPS 2024, arXiv 2403.19211"
    keeps = "a second attention LoRA"
    has_personal_lora = True
    settles = True
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")

    class Options(base.Options):
        """Weights of the two adapters, in training and at inference."""

        mix: float = Field(0.5, ge=0, le=1)
        """a, weight of the local adapter while it trains; the global one has 1 - a."""
        lam: float = Field(0.5, ge=0)
        """lambda, factor of the similarity that weights the local adapter at inference."""
        instances: int = Field(5, ge=1)
        """S, train rows that an input is compared with."""

    @torch.no_grad()
    def receive(self, turn: Turn) -> None:
        """Load g; an l that has not been trained gets an A of the client's own."""
        super().receive(turn)
        if not untrained(turn):
            return
        stream = turn.site.generator("local adapter")
        for name, parameter in turn.split.personal.items():
            if ".lora_A." in name:
                parameter.copy_(uniform_matrix(parameter.size(0), parameter.size(1), stream))

    def personalize(self, turn: Turn, settings: LocalSettings | None = None) -> TrainResult:
        """Train l in a fixed mixture with g, which stands still."""
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
            if state == "personalized":
                on_batch = InstanceWeights(turn, self.options.lam, self.options.instances)
                stack.callback(on_batch.close)
            yield on_batch


class InstanceWeights:
    """Weights both adapters by how much an input is like the client's own: called before every batch.

        alpha(x) = lam * mean_s cos(h(x), h(x_s))        y = W0 x + (1 - alpha) dW_g x + alpha dW_l x

    h is the last layer's hidden state of the prompt's last token with l alone; x_s are S of the client's train
    prompts, drawn once from a stream of its own.

    Args:
        turn: The client's turn; its model is in use until ``close``.
        lam: lambda.
        instances: ``S``.
    """

    def __init__(self, turn: Turn, lam: float, instances: int) -> None:
        self.turn, self.lam = turn, lam
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
        lora: Any = self.turn.site.lora
        device = next(lora.base.parameters()).device
        with lora.use(personal=1.0), autocast(device, self.turn.settings.precision):
            return hidden_states(lora.base, batch.input_ids, batch.attention_mask)[:, -1].float()

    def close(self) -> None:
        """Take the last batch's weights off again."""
        self.stack.close()


def _prompts(examples: Sequence[Example], pad_token_id: int) -> PaddedBatch:
    return pad_batch([Example(e.prompt, e.prompt_length) for e in examples], pad_token_id)
