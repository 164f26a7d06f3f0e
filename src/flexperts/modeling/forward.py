"""One forward pass that computes only the logits that are needed.

Shapes: B rows, S columns, R response columns, V vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.data.batches import IGNORED, PaddedBatch

Precision = Literal["bf16", "fp32"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in ``precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def response_logits(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Return fp32 logits ``[B, R, V]`` that predict the last R columns of the batch."""
    keep = batch.response_columns + 1
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
    }
    if _keeps_logits(model):
        # Indices, not a number: on a slice's strides torch copies the vocabulary matrix once per row.
        columns = batch.input_ids.shape[1]
        inputs["logits_to_keep"] = torch.arange(max(0, columns - keep), columns, device=device)
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[:, -keep:-1].float()


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last layer's hidden states ``[B, S, D]``; the vocabulary projection is not computed."""
    device = next(model.parameters()).device
    output = model.base_model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
    )
    states: Tensor = output.last_hidden_state
    return states


def token_losses(model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return per-row sums of response NLL ``[B]`` (nats) and counts of response tokens ``[B]``."""
    logits = response_logits(model, batch)
    labels = batch.labels[:, -batch.response_columns :].to(logits.device)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1), (labels != IGNORED).sum(1)


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters
