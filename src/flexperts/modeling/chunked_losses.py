"""Losses and scores of many positions without all their logits in memory at once.

A batch of 32 responses of 256 tokens has 1.2 billion logits in a vocabulary of 152,000: 15 GB with the copies that
a loss makes of them. Here the model's body computes all positions, and its head a few of them at a time, with all
that the model does to its logits. Shapes: B rows, D width, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from flexperts.data.batches import IGNORED, PaddedBatch
from flexperts.modeling.forward import body_of, response_logits, token_losses

LOGIT_BYTES = 12
"""Bytes of a scored logit: in the model's dtype, in fp32, and its softmax."""
MOST_BYTES = 2**29
"""Bytes that the logits of one chunk take."""


@dataclass(frozen=True)
class TrainedTokens:
    """The trained tokens of a batch, found on the CPU: a card would be waited for to learn how many they are.

    Args:
        shape: The labels' shape, (B, R).
        places: Their places in the flattened labels, ``[P]``, on the device.
        tokens: The tokens, ``[P]``, on the device.
        counts: Their number in each row, ``[B]``, on the CPU.
    """

    shape: torch.Size
    places: Tensor
    tokens: Tensor
    counts: Tensor

    @classmethod
    def of(cls, labels: Tensor, device: torch.device) -> Self:
        """Return those of ``labels [B, R]`` on the CPU, for values on a device."""
        wanted = labels != IGNORED
        places = wanted.flatten().nonzero().squeeze(1)
        return cls(labels.shape, places.to(device), labels.flatten()[places].to(device), wanted.sum(1))

    def among(self, values: Tensor) -> Tensor:
        """Return the values at these tokens, ``[P, D]`` of ``[B, R, D]``."""
        return values.flatten(0, 1)[self.places]

    def spread(self, losses: Tensor) -> Tensor:
        """Return ``losses [P]`` as ``[B, R]``, with 0 elsewhere."""
        return losses.new_zeros(self.shape.numel()).index_copy(0, self.places, losses).view(self.shape)


def positions_at_once(model: Any) -> int | None:
    """Return the number of positions whose logits fit ``MOST_BYTES``; None means all.

    On a CPU it is all: there a product of few rows can round otherwise than one of many, and scores would change.
    """
    if next(model.parameters()).device.type == "cpu":
        return None
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, MOST_BYTES // (LOGIT_BYTES * vocabulary))


@contextmanager
def body_outputs(model: Any) -> Iterator[list[Any]]:
    """Record what the model's body returns inside the block, one entry per forward pass."""
    outputs: list[Any] = []
    hook = body_of(model).register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


@torch.no_grad()
def chunked_losses(model: Any, output: Any, states: Tensor, labels: Tensor, at_once: int) -> Tensor:
    """Return the NLL ``[P]`` of ``labels [P]`` in nats.

    Args:
        model: A causal language model.
        output: What its body has returned; its hidden states are replaced.
        states: The last layer's hidden states at these positions, ``[P, D]``.
        labels: The tokens that follow them, ``[P]``.
        at_once: Positions whose logits may be in memory at once.
    """
    losses = [torch.zeros(0, device=states.device)]
    for few, next_tokens in zip(torch.split(states, at_once), torch.split(labels, at_once), strict=True):
        losses.append(F.cross_entropy(_head(model, output, few, next_tokens), next_tokens, reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def scored_losses(model: Any, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return the same as ``token_losses``, without gradients, with the logits of a few positions at a time."""
    if (at_once := positions_at_once(model)) is None:
        return token_losses(model, batch)
    output, states = _read(model, batch)
    trained = TrainedTokens.of(batch.labels[:, -batch.response_columns :], states.device)
    losses = chunked_losses(model, output, trained.among(states), trained.tokens, at_once)
    return trained.spread(losses).sum(1), trained.counts


@torch.no_grad()
def scored_logits(model: Any, batch: PaddedBatch, places: Tensor) -> Iterator[Tensor]:
    """Yield the fp32 logits ``[p, V]`` at some of a batch's response columns, a few positions at a time.

    Args:
        model: A causal language model.
        batch: The rows; R columns are their responses.
        places: The positions, in rising order: their places among B * R, ``[P]``, on the model's device.
    """
    at_once, every = positions_at_once(model), len(batch.input_ids) * batch.response_columns
    if at_once is None or every <= at_once:
        yield from _few_of(response_logits(model, batch).flatten(0, 1), places)
        return
    output, states = _read(model, batch)
    ids = torch.zeros_like(places)  # the body, which would read them, is left out
    for few, no_ids in zip(
        torch.split(states.flatten(0, 1)[places], at_once), torch.split(ids, at_once), strict=True
    ):
        yield _head(model, output, few, no_ids)


def _few_of(logits: Tensor, places: Tensor) -> Iterator[Tensor]:
    """Yield some of ``logits [N, V]``, so many at a time that what is made of them fits ``MOST_BYTES``."""
    for few in torch.split(places, max(1, MOST_BYTES // (LOGIT_BYTES * logits.shape[1]))):
        yield logits[few]


def _read(model: Any, batch: PaddedBatch) -> tuple[Any, Tensor]:
    """Return what the model's body returns, and its states ``[B, R, D]`` from which responses are predicted."""
    with body_outputs(model) as outputs:
        response_logits(model, replace(batch, response_columns=1))
    return outputs[0], outputs[0].last_hidden_state[:, -batch.response_columns - 1 : -1]


def _head(model: Any, output: Any, states: Tensor, ids: Tensor) -> Tensor:
    """Return the fp32 logits ``[p, V]`` of states ``[p, D]``, with all that the model does to its logits."""
    output.last_hidden_state = states[None]
    with _body_returns(model, output):
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits[0].float()


@contextmanager
def _body_returns(model: Any, output: Any) -> Iterator[None]:
    """Let the model's body return an output that it has computed before."""
    body = body_of(model)
    own = body.__dict__.get("forward")  # accelerate's, where it moves weights
    body.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own
