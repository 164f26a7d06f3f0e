"""Selecting a client's experts: its train rows through the untouched base, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.grafting.selection import Batch, LayerScores, reconstruction_scores
from flexperts.modeling.forward import Precision, autocast, hidden_states
from flexperts.moe.layout import LayerExperts


@dataclass(frozen=True)
class CalibrationSettings:
    """Which tokens the selection reads.

    Args:
        rows: Train rows, drawn at random where there are more.
        tokens: Token budget per layer.
        batch_size: Rows per forward pass.
        pad_token_id: Token that fills short rows; it is never scored.
        precision: As in training.
        pairs: Whether experts are compared with each other too.
    """

    rows: int
    tokens: int
    batch_size: int
    pad_token_id: int
    precision: Precision
    pairs: bool = False


def score_experts(
    model: Any,
    experts: Sequence[LayerExperts],
    examples: Sequence[Example],
    settings: CalibrationSettings,
    generator: Generator,
) -> list[LayerScores]:
    """Score every expert of every layer on a client's rows.

    Args:
        model: The base, without grafts and adapters.
        experts: Its experts modules.
        examples: The client's encoded train rows.
        settings: Which tokens are read.
        generator: Stream that draws rows and tokens.
    """
    batches = calibration_batches(examples, settings, generator)
    device = next(model.parameters()).device

    def forward(batch: Batch) -> None:
        hidden_states(model, **batch)

    with autocast(device, settings.precision):
        return reconstruction_scores(
            forward, experts, batches, max_tokens=settings.tokens, generator=generator, pairs=settings.pairs
        )


def calibration_batches(
    examples: Sequence[Example], settings: CalibrationSettings, generator: Generator
) -> list[Batch]:
    """Draw a client's rows and put those of similar length together."""
    order = torch.randperm(len(examples), generator=generator).tolist()[: settings.rows]
    chosen = sorted((examples[i] for i in order), key=lambda example: len(example.input_ids))
    padded = [
        pad_batch(chosen[start : start + settings.batch_size], settings.pad_token_id)
        for start in range(0, len(chosen), settings.batch_size)
    ]
    return [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in padded]
