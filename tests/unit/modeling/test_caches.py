"""Caches whose rows come and go: what stays computes as if it had been alone, in full and in windowed attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from flexperts.modeling.caches import append_rows, select_rows, sharing
from flexperts.modeling.forward import next_logits
from flexperts.testing import tiny_model

LENGTHS = {"a window not filled yet": 5, "a window filled": 9, "longer": 20}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt_oss", layer_types=["sliding_attention", "full_attention"], sliding_window=8)


@torch.no_grad()
def read(model: Any, tokens: Tensor, mask: Tensor | None = None, cache: Any = None) -> tuple[Tensor, Any]:
    logits, cache = next_logits(model, tokens, torch.ones_like(tokens) if mask is None else mask, cache)
    return logits, cache


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("first", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("second", LENGTHS.values(), ids=LENGTHS.keys())
def test_joined_rows_go_on_as_if_alone_and_so_does_who_stays(model: Any, first: int, second: int) -> None:
    prompts, steps = [tokens(first, 1), tokens(second, 2)], torch.cat([tokens(3, 3), tokens(3, 4)])
    alone = []
    for row, prompt in enumerate(prompts):
        seen = torch.cat([prompt, steps[row : row + 1]], dim=1)
        alone.append([read(model, seen[:, : prompt.shape[1] + n])[0] for n in (1, 2, 3)])

    (_, cache), (_, other) = (read(model, prompt) for prompt in prompts)
    append_rows(cache, other)
    columns = max(first, second)
    mask = torch.cat([pad(torch.ones_like(p), (columns - p.shape[1], 0)) for p in prompts])
    for n in (0, 1):
        mask = pad(mask, (0, 1), value=1)
        logits, cache = read(model, steps[:, n : n + 1], mask, cache)
        torch.testing.assert_close(logits, torch.cat([one[n] for one in alone]))

    cut = columns - second
    select_rows(cache, torch.tensor([1]), cut)
    assert cache.get_seq_length() == second + 2
    logits, _ = read(model, steps[1:, 2:], pad(mask[1:, cut:], (0, 1), value=1), cache)
    torch.testing.assert_close(logits, alone[1][2])


@pytest.mark.parametrize(
    ("family", "when"),
    [
        ("qwen2_moe", "any time"),
        ("gpt_oss", "any time"),
        ("jamba", "from the start"),
        ("deepseek_v32", "never"),
        ("minimax", "never"),
    ],
)
def test_when_rows_may_share_a_cache(family: str, when: str) -> None:
    assert sharing(read(tiny_model(family), tokens(2, 0))[1]) == when
