"""Prompts read once: their responses score as in one pass, and what is read can still be answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexperts.data.batches import pad_batch, pad_responses
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.evaluation.generation import greedy_answers, prompt_batch
from flexperts.modeling.caches import read_prompts, response_losses
from flexperts.modeling.forward import token_losses
from flexperts.testing import byte_tokenizer, tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "deepseek_v3": {},  # compressed keys
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, **FAMILIES[request.param])


@pytest.fixture
def encoder() -> PromptEncoder:
    return PromptEncoder(byte_tokenizer())


def examples(*lengths: tuple[int, int]) -> list[Example]:
    """Rows of so many prompt and response tokens."""
    stream = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 256, (p + r,), generator=stream).tolist() for p, r in lengths]
    return [Example(tuple(ids), p) for ids, (p, _) in zip(drawn, lengths, strict=True)]


@pytest.mark.parametrize(
    "lengths", [((7, 4), (12, 1), (3, 11)), ((5, 1), (9, 1)), ((20, 6),)], ids=["mixed", "one token", "alone"]
)
@torch.no_grad()
def test_responses_score_as_in_one_pass_over_everything(model: Any, lengths: tuple[tuple[int, int], ...]) -> None:
    rows = examples(*lengths)
    expected, counts = zip(*(token_losses(model, pad_batch([row], 258)) for row in rows), strict=True)
    read = read_prompts(model, pad_batch([Example(row.prompt, row.prompt_length) for row in rows], 258))
    assert read.can_go_on
    sums, tokens = response_losses(model, read, pad_responses(rows, 258))
    torch.testing.assert_close(sums, torch.cat(expected))
    assert tokens.tolist() == torch.cat(counts).tolist() == [r for _, r in lengths]


@torch.no_grad()
def test_scoring_leaves_the_prompts_as_they_were_read(model: Any, encoder: PromptEncoder) -> None:
    rows = examples((7, 4), (12, 9), (3, 2))
    prompts = prompt_batch([row.prompt for row in rows], encoder)
    expected = greedy_answers(model, encoder, read_prompts(model, prompts), 8, rows_leave=True)
    read = read_prompts(model, prompts)
    response_losses(model, read, pad_responses(rows, 258))
    assert greedy_answers(model, encoder, read, 8, rows_leave=True) == expected
    assert len(set(expected)) == len(rows)


@pytest.mark.parametrize(("family", "goes_on"), [("qwen3_next", False), ("deepseek_v32", False), ("olmoe", True)])
@torch.no_grad()
def test_running_states_and_caches_of_their_own_take_no_response_on_top(family: str, goes_on: bool) -> None:
    prompts = pad_batch(examples((5, 0)), 258)
    assert read_prompts(tiny_model(family), prompts).can_go_on is goes_on
