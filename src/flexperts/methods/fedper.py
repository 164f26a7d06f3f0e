"""FedPer and FedRep: the lower blocks' adapter is averaged, the last blocks' adapter stays."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flexperts.errors import ConfigError
from flexperts.methods.kit.local_steps import personal_then_shared
from flexperts.methods.kit.method import Method, OnBatch, State
from flexperts.methods.kit.turn import Turn
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.training.local import TrainResult

_BLOCK = re.compile(r"\.layers\.(\d+)\.")


class FedPer(Method):
    """LoRA of the lower blocks averaged; LoRA of the last blocks personal; both trained together.

    Source: Arivazhagan et al., 2019 (arXiv 1912.00818); local step as in PFLlib.
    Model_i = head_i(body(x)): body = LoRA of blocks 1..L-m, one for all; head_i = LoRA of the last m, of client i.
    min over body, head_1..N of sum_i p_i f_i(body, head_i), p_i = n_i / n; body <- sum_i p_i body_i.
    Trained: attention LoRA of all blocks, together. Sent: LoRA of the lower L-m blocks. Aggregated: mean by rows.
    Stays: LoRA of the last m blocks. Inference: personalized = global body + own head; global = global body alone,
    the last m blocks as pretrained (their B at zero).
    Open choices: the paper splits a classifier by layers and names no split for language models. Here the body is
    the lower blocks' LoRA, the head is the last m blocks' LoRA (``personal_layers``; a quarter by default), and
    lm_head has no adapter. Blocks without an adapted attention layer do not count.
    """

    name = "fedper"
    summary = "LoRA of the lower blocks averaged, LoRA of the last blocks personal, trained together"
    source = "Arivazhagan et al., 2019, arXiv 1912.00818"
    sends = "attention LoRA of the lower blocks"
    keeps = "attention LoRA of the last blocks"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")

    class Options(Method.Options):
        """Split of the blocks into shared and personal."""

        personal_layers: int | None = Field(None, ge=1)
        """m, last blocks whose LoRA is personal; without it, a quarter of the blocks, at least 1."""

    options: Options

    def shared(self, names: Collection[str]) -> set[str]:
        """Return the names of the lower blocks' LoRA."""
        blocks = {name: _block(name) for name in names if name.startswith(SHARED_PREFIX)}
        present = sorted(set(blocks.values()))
        count = self.options.personal_layers or max(1, len(present) // 4)
        if count >= len(present):
            raise ConfigError(
                f"personal_layers = {count} of {len(present)} adapted blocks",
                "at least one block must be shared",
                "lower personal_layers, or use method 'local_lora'",
            )
        return {name for name, block in blocks.items() if block < present[-count]}

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Set the head to zero in the global state."""
        with ExitStack() as stack:
            if state == "global":
                stack.enter_context(_times(_heads(turn), 0.0))
            yield stack.enter_context(super().in_state(turn, state))

    def mixed(self, turn: Turn, weight: float) -> AbstractContextManager[None]:
        """Return the model with a share of the head's outputs."""
        return _times(_heads(turn), weight)


def _block(name: str) -> int:
    found = _BLOCK.search(name)
    if found is None:
        raise ConfigError(
            name, "the parameter's name has no block number (`layers.<number>.`)", "use a base with numbered blocks"
        )
    return int(found[1])


def _heads(turn: Turn) -> list[Tensor]:
    """Return the last blocks' B."""
    return [p for name, p in turn.split.personal.items() if ".lora_B." in name]


@contextmanager
def _times(tensors: Collection[Tensor], factor: float) -> Iterator[None]:
    """Multiply tensors inside the block; a factor of 0 sets them to zero, even if they are not finite."""
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(factor) if factor else tensor.zero_()
        try:
            yield
        finally:
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)


class FedRep(FedPer):
    """FedPer's split; in every round, the personal blocks train first, then the shared ones.

    Source: Collins et al., ICML 2021 (arXiv 2102.07078), Algorithm 1; PFLlib.
    Round, client i: head_i <- argmin f_i(body, head_i) for some steps, body as received; then
    body_i <- body - steps on f_i(body, head_i), head_i as just trained; body <- sum_i p_i body_i, p_i = n_i / n.
    Trained: attention LoRA of the last m blocks (head), then of the lower blocks (body). Sent: the body.
    Aggregated: mean by rows. Stays: the head. Inference: personalized = global body + own head; global = global
    body alone, the last m blocks as pretrained (their B at zero).
    Open choices: the split is the same as for fedper. The paper trains the head to (near) optimality and the body
    for one step or epoch; here the two phases divide the round's steps, ``head_share`` for the head, so that the
    budget is that of the other methods. Each phase takes at least one step, with a separate optimizer and schedule.
    The mean is by rows; the paper's is uniform.
    """

    name = "fedrep"
    summary = "as fedper, but each round trains the personal blocks first and then the shared ones"
    source = "Collins et al., ICML 2021, arXiv 2102.07078"

    class Options(FedPer.Options):
        """Split of the blocks, and of a round's steps."""

        head_share: float = Field(0.5, gt=0, lt=1)
        """Share of each round's steps that trains the personal blocks."""

    options: Options

    def train(self, turn: Turn) -> TrainResult:
        """Train the head with the body frozen, then the body with the head frozen."""
        return personal_then_shared(turn, self.options.head_share)
