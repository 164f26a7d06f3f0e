"""Attention while a model trains: fp32 inside the block on a CPU, transformers' own outside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexperts.modeling.attention import attention_in_fp32

MASKS = {
    "none": None,
    "truth values": torch.ones(6, 6, dtype=torch.bool).tril()[None, None],
    "added": torch.full((6, 6), -1e4).triu(1)[None, None].bfloat16(),
}


def drawn(dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value ``[B, heads, S, D]``, the same values in every type."""
    stream = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 6, 4, generator=stream).bfloat16().to(dtype) for _ in range(3)]


def computed(tensors: list[Tensor], mask: Tensor | None) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=tensors[0].dtype == torch.bfloat16):
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Identity(), *tensors, mask)
    return output


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_bf16_attention_is_that_of_fp32_rounded_once(mask: Tensor | None) -> None:
    wide = mask.float() if mask is not None and mask.is_floating_point() else mask
    expected = computed(drawn(torch.float32), wide).bfloat16()
    with attention_in_fp32():
        found = computed(drawn(torch.bfloat16), mask)
    assert torch.equal(found, expected)


def test_transformers_own_function_is_back_after_an_error() -> None:
    with pytest.raises(RuntimeError), attention_in_fp32():
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
