"""The calibration that the selection's benchmark works on: `smol-moe`, shipped silos, the default settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator

from flexperts.config.data import DataConfig
from flexperts.config.model import GraftConfig, ModelConfig
from flexperts.data.clients import load_clients
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.modeling.forward import autocast, hidden_states
from flexperts.modeling.load import load_base
from flexperts.moe.experts import find_experts
from flexperts.moe.layout import LayerExperts
from flexperts.selection.selection import (
    Batch,
    CalibrationSettings,
    LayerScores,
    calibration_batches,
    score_experts,
)

BATCH_SIZE = 2
"""As in the quick start."""


@dataclass
class Workload:
    """The base in memory, and how a client calibrates on it."""

    model: Any
    encoder: PromptEncoder
    experts: Sequence[LayerExperts]
    settings: CalibrationSettings

    def examples(self, seed: int, rows: int) -> dict[str, list[Example]]:
        """Return the encoded train rows of the four shipped silos, by name."""
        silos = {"silos": {"seed": seed, "train_rows": rows, "test_rows": 4}}
        clients = load_clients(DataConfig.model_validate(silos), seed)
        return {name: self.encoder.encode_all(rows.train) for name, rows in clients.items()}

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        """Return the batches that ``select`` reads."""
        return calibration_batches(examples, self.settings, Generator().manual_seed(0))

    def select(self, examples: Sequence[Example]) -> list[LayerScores]:
        """Score as a client does in its first round."""
        return score_experts(self.model, self.experts, examples, self.settings, Generator().manual_seed(0))

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> None:
        """Run the base, without its vocabulary projection, and keep nothing."""
        with autocast(torch.device("cpu"), "bf16"):
            for batch in batches:
                hidden_states(self.model, **batch)


def load() -> Workload:
    """Load the base, and warm it up."""
    base = load_base(ModelConfig(device="cpu"))
    encoder = PromptEncoder(base.tokenizer)
    settings = CalibrationSettings(
        graft=GraftConfig(),
        batch_size=BATCH_SIZE,
        pad_token_id=base.tokenizer.pad_token_id,
        precision="bf16",
    )
    workload = Workload(base.model, encoder, find_experts(base.model), settings)
    workload.select(next(iter(workload.examples(0, 4).values())))
    return workload
