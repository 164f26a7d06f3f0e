"""Direct preference optimization as a local objective (Rafailov et al., 2023, arXiv 2305.18290, equation 7).

    L = -1/n sum_i log sigmoid(beta (r_i(chosen) - r_i(rejected))),   r_i(y) = log p(y | x_i) - log p_ref(y | x_i)

Log-probabilities are sums over an answer's tokens with its end token. The reference is the untouched base: the same
weights with all adapters and parts off, so there is no second model. TRL 1.16 computes this loss inside its
``DPOTrainer`` alone; a test compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import Example
from flexperts.modeling.forward import autocast, token_losses
from flexperts.training.local import LocalSettings


@dataclass(frozen=True)
class DirectPreference:
    """DPO's loss, an ``Objective``. A forward pass holds both answers of ``training.rows_per_pass`` rows.

    Args:
        beta: Factor of the log-ratios.
        reference: Returns a context in which the model is the untouched base.
    """

    beta: float
    reference: Callable[[], AbstractContextManager[object]]

    def __call__(self, model: nn.Module, rows: Sequence[Example], settings: LocalSettings) -> Iterator[Tensor]:
        """Yield each micro-batch's share of the batch's mean loss, in nats per row."""
        size, pad = settings.training.rows_per_pass, settings.pad_token_id
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        batches = [pad_batch([row.forms[side] for side in (0, 1) for row in part], pad) for part in parts]
        before = self._reference(model, batches, settings)
        for batch, base in zip(batches, before, strict=True):
            ratios = log_likelihoods(model, batch, settings) - base
            chosen, rejected = ratios.chunk(2)
            yield -logsigmoid(self.beta * (chosen - rejected)).sum() / len(rows)

    @torch.no_grad()
    def _reference(self, model: nn.Module, batches: Sequence[PaddedBatch], settings: LocalSettings) -> list[Tensor]:
        """Return the untouched base's log-likelihoods, without dropout."""
        was_training = model.training
        model.eval()
        try:
            with self.reference():
                return [log_likelihoods(model, batch, settings) for batch in batches]
        finally:
            model.train(was_training)


def log_likelihoods(model: nn.Module, batch: PaddedBatch, settings: LocalSettings) -> Tensor:
    """Return the summed log-likelihood of every row's answer, ``[B]`` in nats."""
    with autocast(next(model.parameters()).device, settings.precision):
        sums, _ = token_losses(model, batch)
    return -sums
