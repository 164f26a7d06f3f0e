"""Attention: how a CPU and a card compute it while a model trains, and its masks on a card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PADDED: ContextVar[bool | None] = ContextVar("padded", default=None)
"""What ``padding_known`` has told, if anything."""


@contextmanager
def attention_in_fp32() -> Iterator[None]:
    """Make a CPU compute attention in fp32 inside the block, instead of in bf16 with torch's kernel.

    That kernel multiplies tile by tile, and in bf16 each small product costs a library call: with rows of 60 tokens
    its backward pass takes a fifth of a training step. In fp32 it takes less than half of that time; with long rows
    it is not slower.
    """
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


@contextmanager
def attention_without_cudnn() -> Iterator[None]:
    """Keep torch from cuDNN's attention on CUDA inside the block; what the caller had set holds again after it.

    In torch 2.13 its backward pass gives NaN where a mask hides whole rows and S % 128 is 64 (pytorch#196678), and
    padding on the left always has such rows. A torch in which that is fixed ends this.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def padding_known(padded: bool) -> Iterator[None]:
    """Let transformers make attention masks inside the block without asking a card whether a row has padding.

    It asks in every forward pass, to leave out a mask that hides nothing, and the host waits for the answer.

    Args:
        padded: Whether a row has padding. True is always right; False also leaves the choice of kernel to torch.
    """
    token = _PADDED.set(padded)
    try:
        yield
    finally:
        _PADDED.reset(token)


def _mask(
    *, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **others: Any
) -> Tensor | None:
    """Return what transformers' function for masks does, which is public and replaced by this one."""
    padded = None if torch.compiler.is_compiling() else _PADDED.get()  # a compiled pass asks nothing
    if padded is not None and attention_mask is not None and attention_mask.device.type != "cpu":
        attention_mask = attention_mask if padded else None
        allow_is_causal_skip = allow_is_causal_skip and not padded
    mask: Tensor | None = sdpa_mask(
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **others
    )
    return mask


ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask


def _attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' attention in fp32 and return its results in the original dtype."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, *args, **kwargs)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), *map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()}
        )
    return output.to(dtype), weights


def _widened(value: Any) -> Any:
    """Return floating-point tensors (keys, values, additive masks) in fp32, and other values unchanged."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
