"""Key-value caches that rows can join and leave during generation.

All rows end at the last column; shorter rows have padding on the left, which the attention mask hides. Therefore
caches are padded on the left before they are joined, and columns that no row needs are removed on the left.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from flexperts.data.batches import IGNORED, PaddedBatch
from flexperts.modeling.chunked_losses import TrainedTokens, body_outputs, chunked_losses, positions_at_once
from flexperts.modeling.forward import last_logits, next_logits

_BY_COLUMNS = {DynamicLayer, DynamicSlidingWindowLayer}
_BY_ROWS = {
    *_BY_COLUMNS,
    DummyLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}
Sharing = Literal["any time", "from the start", "never"]
"""When rows may join a batch."""


def sharing(cache: Any) -> Sharing:
    """Return when rows may share a cache without changing each other's answers.

    "any time": every layer has plain keys and values by column, with or without a sliding window. "from the start":
    there are also running states, which padding does not change. "never": caches with a model's own class, and
    indexers, because padding was observed to change which keys they choose.
    """
    kinds = {type(layer) for layer in cache.layers}
    if type(cache) is not DynamicCache or not kinds <= _BY_ROWS:
        return "never"
    return "any time" if kinds <= _BY_COLUMNS else "from the start"


def append_rows(cache: Any, other: Any) -> None:
    """Append another cache's rows to a cache; rows must be able to share both at any time."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if not layer.is_initialized:  # a layer that uses another layer's keys
            continue
        width = max(layer.keys.shape[-2], more.keys.shape[-2])
        layer.keys = torch.cat([_widened(layer.keys, width), _widened(more.keys, width)])
        layer.values = torch.cat([_widened(layer.values, width), _widened(more.values, width)])
        if layer.is_sliding:
            layer.cumulative_length = max(layer.cumulative_length, more.cumulative_length)


def select_rows(cache: Any, rows: Tensor, cut: int) -> None:
    """Keep some rows of a cache.

    Args:
        cache: Any cache.
        rows: Indices of the rows to keep, ``[R]``.
        cut: Number of first columns to remove too; 0 unless the cache may be shared at any time.
    """
    cache.reorder_cache(rows)
    for layer in cache.layers if cut else ():
        if not layer.is_initialized:
            continue
        left = cut
        if layer.is_sliding:  # it has the last columns only, so fewer of them are removed
            left = max(0, cut - (layer.cumulative_length - layer.keys.shape[-2]))
            layer.cumulative_length -= cut
        layer.keys, layer.values = layer.keys[..., left:, :], layer.values[..., left:, :]


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Return ``[B, H, C, d]`` padded to ``width`` columns with zeros on the left."""
    return F.pad(tensor, (0, 0, width - tensor.shape[-2], 0))


@dataclass(frozen=True)
class ReadPrompts:
    """The result of reading a batch of prompts.

    Args:
        logits: Logits of each prompt's next token, ``[B, V]`` fp32.
        mask: 1 on tokens and 0 on padding, ``[B, C]``.
        cache: Keys and values of the C columns.
        padded: Whether a prompt has padding.
    """

    logits: Tensor
    mask: Tensor
    cache: Any
    padded: bool

    @property
    def can_go_on(self) -> bool:
        """Whether several columns can be read at once after these; other caches take one column at a time."""
        return sharing(self.cache) == "any time"


def read_prompts(model: Any, prompts: PaddedBatch) -> ReadPrompts:
    """Read a batch of prompts."""
    device = next(model.parameters()).device
    mask = prompts.attention_mask.to(device)
    logits, cache = next_logits(model, prompts.input_ids.to(device), mask, padded=prompts.padded)
    return ReadPrompts(logits, mask, cache, prompts.padded)


def response_losses(model: Any, read: ReadPrompts, responses: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return the same as ``token_losses``, from prompts that were already read; their cache is not changed.

    Args:
        model: The model that has read the prompts.
        read: The prompts; ``can_go_on`` must be true.
        responses: The responses, padded on the right; each has at least one token.
    """
    labels, device = responses.labels, read.mask.device
    logits, losses, at_once = read.logits[:, None], [], positions_at_once(model)
    if (columns := responses.response_columns - 1) > 0:  # nothing is predicted from the last column
        ids, mask = (t[:, :columns].to(device) for t in (responses.input_ids, responses.attention_mask))
        whole, cache = torch.cat([read.mask, mask], dim=1), copy.deepcopy(read.cache)
        if at_once is None:
            logits = torch.cat([logits, last_logits(model, ids, whole, cache, keep=columns)[0]], dim=1)
        else:
            with body_outputs(model) as outputs:
                last_logits(model, ids, whole, cache, keep=1)
            later, states = TrainedTokens.of(labels[:, 1:], device), outputs[0].last_hidden_state
            found = chunked_losses(model, outputs[0], later.among(states), later.tokens, at_once)
            losses.append(later.spread(found))
    known = TrainedTokens.of(labels[:, : logits.shape[1]], device)
    found = F.cross_entropy(known.among(logits), known.tokens, reduction="none")
    return torch.cat([known.spread(found), *losses], dim=1).sum(1), (labels != IGNORED).sum(1)
