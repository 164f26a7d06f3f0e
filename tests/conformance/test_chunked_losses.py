"""Losses with a few positions' logits at a time are those of all logits at once, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexperts.data.batches import pad_batch, pad_responses
from flexperts.data.prompts import Example
from flexperts.modeling import caches, chunked_losses
from flexperts.modeling.caches import read_prompts, response_losses
from flexperts.modeling.chunked_losses import scored_losses
from flexperts.modeling.forward import token_losses
from flexperts.testing import tiny_model

PAD = 258


def rows() -> list[Example]:
    """Rows with responses of 4, 1 and 11 tokens."""
    stream = torch.Generator().manual_seed(0)
    lengths = ((7, 4), (12, 1), (3, 11))
    return [Example(tuple(torch.randint(0, 256, (p + r,), generator=stream).tolist()), p) for p, r in lengths]


@torch.no_grad()
def test_a_few_positions_at_a_time_have_the_losses_of_all_at_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples, seen = tiny_model(family), rows(), list[int]()
    batch = pad_batch(examples, PAD)
    expected, counts = token_losses(model, batch)
    prompts = pad_batch([Example(row.prompt, row.prompt_length) for row in examples], PAD)
    with_cache = None
    if (read := read_prompts(model, prompts)).can_go_on:
        with_cache = response_losses(model, read, pad_responses(examples, PAD))

    def recorded(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
        seen.append(args[0].shape[:-1].numel())

    for module in (chunked_losses, caches):
        monkeypatch.setattr(module, "positions_at_once", lambda model: 3)
    head = model.get_output_embeddings().register_forward_hook(recorded)
    sums, tokens = scored_losses(model, batch)
    assert tokens.tolist() == counts.tolist() == [4, 1, 11]
    torch.testing.assert_close(sums, expected)
    # The first pass computes one column of three rows, if the family lets it; then 16 positions, three at a time.
    assert seen[1:] == [3, 3, 3, 3, 3, 1]
    if with_cache is not None:
        sums, tokens = response_losses(model, read, pad_responses(examples, PAD))
        assert tokens.tolist() == with_cache[1].tolist()
        torch.testing.assert_close(sums, with_cache[0])
    head.remove()
    torch.testing.assert_close(token_losses(model, batch)[0], expected, rtol=0, atol=0)  # the model is as before


def test_a_cpu_computes_all_at_once_and_a_card_as_many_as_half_a_gigabyte_holds() -> None:
    model = tiny_model()
    assert chunked_losses.positions_at_once(model) is None
    vocabulary = model.config.vocab_size
    assert chunked_losses.positions_at_once(model.to("meta")) == 2**29 // (12 * vocabulary)
