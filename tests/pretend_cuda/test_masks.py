"""Attention masks on a card: transformers' own, without a question to the card whether a row has padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from card import Counts
from test_training import loaded
from torch import Tensor

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.modeling.caches import read_prompts
from flexperts.modeling.forward import next_logits, response_logits
from flexperts.modeling.load import LoadedBase
from flexperts.testing import FAMILIES, save_tiny_base

ASKING = {
    "bailing_hybrid", "granitemoehybrid", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lfm2_moe",
    "minimax", "nemotron_h", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "zaya",
}  # fmt: skip
"""Families whose recurrent layers ask transformers' other function for masks, which takes no such hint."""


NO_KERNEL = {"kolibri1"}
"""Families that in fp32 ask a card for an operation that a CPU does not have."""


@torch.no_grad()
def computed(base: LoadedBase, lengths: tuple[int, int]) -> list[Tensor]:
    """Return logits of two rows' responses, and of the tokens after their prompts and after one more column."""
    rows = [Example(tuple(range(3, 3 + length)), length - 3) for length in lengths]
    read = read_prompts(base.model, pad_batch([Example(row.prompt, row.prompt_length) for row in rows], 0))
    found = [response_logits(base.model, pad_batch(rows, 0)), read.logits.clone()]
    more = torch.full((2, 1), 7, device=read.mask.device)
    mask = torch.cat([read.mask, torch.ones_like(more)], dim=1)
    found.append(next_logits(base.model, more, mask, read.cache, read.padded)[0])
    return [logits.cpu() for logits in found]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_KERNEL))
def test_a_family_computes_as_on_a_cpu(tmp_path: Path, counts: Counts, family: str) -> None:
    folder = save_tiny_base(tmp_path / "base", family, max_position_embeddings=256)
    here, there = (loaded(folder, f"model.device={device}")[0] for device in ("cpu", "cuda"))
    for lengths in ((16, 16), (16, 9)):
        expected = computed(here, lengths)
        counts.reset()
        for ours, theirs in zip(computed(there, lengths), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        asked = [place for place in counts.waits if "masking_utils" in place]
        assert bool(asked) == (family in ASKING), asked
