"""Forward passes that compute only the logits that are needed.

Shapes: B rows, S columns, R response columns, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.data.batches import IGNORED, PaddedBatch
from flexperts.modeling.attention import padding_known

Precision = Literal["bf16", "fp32"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in ``precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def response_logits(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Return fp32 logits ``[B, R, V]`` that predict the last R columns of the batch."""
    columns, responses = batch.input_ids.shape[1], batch.response_columns
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
    }
    if takes(model, "logits_to_keep"):
        # Indices, not a number: on a slice's strides torch copies the vocabulary matrix once per row.
        inputs["logits_to_keep"] = torch.arange(columns - responses - 1, columns - 1, device=device)
    with padding_known(batch.padded):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return (logits if logits.shape[1] == responses else logits[:, -responses - 1 : -1]).float()


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last layer's hidden states ``[B, S, D]``; the vocabulary projection is not computed."""
    device = next(model.parameters()).device
    with padding_known(not bool(attention_mask.all())):
        output = body_of(model)(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
        )
    states: Tensor = output.last_hidden_state
    return states


def body_of(model: Any) -> Any:
    """Return all of a model but its vocabulary projection; a model with adapters has the base's body."""
    base = _without_adapters(model)
    # In multimodal families, the text model's ``base_model`` may be the text model itself.
    return base.model if base.base_model is base else base.base_model


def next_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, padded: bool = True
) -> tuple[Tensor, Any]:
    """Return fp32 logits ``[B, V]`` of the token after the last column, and the cache with the new columns.

    Args:
        model, input_ids, attention_mask, cache, padded: As for ``last_logits``.
    """
    logits, cache = last_logits(model, input_ids, attention_mask, cache, padded, keep=1)
    return logits[:, -1], cache


def last_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: Any = None,
    padded: bool = True,
    *,
    keep: int,
) -> tuple[Tensor, Any]:
    """Return fp32 logits ``[B, keep, V]`` after each of the last columns, and the cache with all columns.

    Args:
        model: A causal language model.
        input_ids: Columns that the cache does not have yet, ``[B, S]``.
        attention_mask: 1 on tokens and 0 on padding, for cache and input, ``[B, C + S]``.
        cache: Keys and values of the C columns before.
        padded: Whether a row has padding, which a card is not asked; True where it is not known.
        keep: Number of last columns for which logits are returned.
    """
    columns = input_ids.shape[1]
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if takes(model, "position_ids"):
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -columns:]
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = torch.arange(columns - keep, columns, device=input_ids.device)
    # transformers 5.24 renamed the argument; 5.23, and code that ships with a base, have the old name.
    name = "cache" if takes(model, "cache") else "past_key_values"
    with padding_known(padded):
        output = model(**inputs, **{name: cache}, use_cache=True)
    return output.logits[:, -keep:].float(), getattr(output, name)


def token_losses(model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return per-row sums of response NLL ``[B]`` (nats), and counts of response tokens ``[B]`` on the CPU."""
    logits = response_logits(model, batch)
    labels = batch.labels[:, -batch.response_columns :]
    # Flattened, not transposed, so that each token's logits stay contiguous in memory.
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels).sum(1), (labels != IGNORED).sum(1)


def takes(model: Any, argument: str) -> bool:
    """Return whether a model's forward, with or without adapters, has an argument of that name."""
    return argument in _arguments(type(_without_adapters(model)).forward)


def _without_adapters(model: Any) -> Any:
    """Return the base, in which PEFT's adapters are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the argument names of a model class's forward; cached, as every decoded token needs them."""
    return frozenset(inspect.signature(forward).parameters)
