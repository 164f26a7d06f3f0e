"""Key-value caches whose rows come and go while they are in use.

Rows end at the last column; what a row has less than the longest one is padding on its left, which the attention
mask hides. So two caches are joined, and columns that no row needs are cut, on the left.
"""

from __future__ import annotations

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
