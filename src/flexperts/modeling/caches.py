"""Key-value caches whose rows come and go while they are in use.

Rows end at the last column; what a row has less than the longest one is padding on its left, which the attention
mask hides. So two caches are joined, and columns that no row needs are cut, on the left.
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
"""When rows may come to share a batch."""


def sharing(cache: Any) -> Sharing:
    """Return when rows may share a cache without changing each other's answers.

    Any time, where every layer holds plain keys and values by column, windowed or not. From the start, where there
    are running states as well, which padding leaves alone. Never with caches of a model's own and with indexers,
    whose choice of keys padding was seen to change.
    """
    kinds = {type(layer) for layer in cache.layers}
    if type(cache) is not DynamicCache or not kinds <= _BY_ROWS:
        return "never"
    return "any time" if kinds <= _BY_COLUMNS else "from the start"


def join(cache: Any, other: Any) -> None:
    """Add the rows of another cache below those of a cache; both may be shared at any time."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if not layer.is_initialized:  # a layer that uses another one's keys
            continue
        width = max(layer.keys.shape[-2], more.keys.shape[-2])
        layer.keys = torch.cat([_widened(layer.keys, width), _widened(more.keys, width)])
        layer.values = torch.cat([_widened(layer.values, width), _widened(more.values, width)])
        if layer.is_sliding:
            layer.cumulative_length = max(layer.cumulative_length, more.cumulative_length)


def keep_rows(cache: Any, rows: Tensor, cut: int) -> None:
    """Keep some rows of a cache.

    Args:
        cache: Any cache.
        rows: Which rows, ``[R]``.
        cut: First columns to leave out as well; 0 unless the cache may be shared at any time.
    """
    cache.reorder_cache(rows)
    for layer in cache.layers if cut else ():
        if not layer.is_initialized:
            continue
        left = cut
        if layer.is_sliding:  # it holds the last columns only, of which some may be cut
            left = max(0, cut - (layer.cumulative_length - layer.keys.shape[-2]))
            layer.cumulative_length -= cut
        layer.keys, layer.values = layer.keys[..., left:, :], layer.values[..., left:, :]


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Return ``[B, H, C, d]`` with columns of zeros on the left."""
    return F.pad(tensor, (0, 0, width - tensor.shape[-2], 0))


@dataclass(frozen=True)
class ReadPrompts:
    """What reading a batch of prompts leaves.

    Args:
        logits: Of each prompt's next token, ``[B, V]`` fp32.
        mask: 1 on tokens and 0 on padding, ``[B, C]``.
        cache: Keys and values of the C columns.
    """

    logits: Tensor
    mask: Tensor
    cache: Any

    @property
    def can_go_on(self) -> bool:
        """Whether several columns can be read on top: running states, and caches of a model's own, take one."""
        return sharing(self.cache) == "any time"


def read_prompts(model: Any, prompts: PaddedBatch) -> ReadPrompts:
    """Read a batch of prompts."""
    device = next(model.parameters()).device
    mask = prompts.attention_mask.to(device)
    logits, cache = next_logits(model, prompts.input_ids.to(device), mask)
    return ReadPrompts(logits, mask, cache)


def response_losses(model: Any, read: ReadPrompts, responses: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return what ``token_losses`` does, from prompts that are read already and can go on; these stay as they are.

    Args:
        model: The model that has read the prompts.
        read: What reading them left.
        responses: Their responses, padded on the right; each has at least one token.
    """
    labels = responses.labels.to(read.mask.device)
    logits = read.logits[:, None]
    if (columns := responses.response_columns - 1) > 0:  # nothing is predicted from the last one
        ids, mask = (t[:, :columns].to(read.mask.device) for t in (responses.input_ids, responses.attention_mask))
        whole = torch.cat([read.mask, mask], dim=1)
        more, _ = last_logits(model, ids, whole, copy.deepcopy(read.cache), keep=columns)
        logits = torch.cat([logits, more], dim=1)
    wanted = labels != IGNORED
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[wanted] = F.cross_entropy(logits[wanted], labels[wanted], reduction="none")
    return losses.sum(1), wanted.sum(1)
