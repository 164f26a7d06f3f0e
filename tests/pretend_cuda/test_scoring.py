"""Scoring on a card: the logits of all rows are never there at once."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from card import Block, Counts
from test_training import loaded

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.modeling import chunked_losses
from flexperts.modeling.chunked_losses import LOGIT_BYTES, scored_losses
from flexperts.modeling.load import LoadedBase
from flexperts.testing import save_tiny_base

ROWS, PROMPT, RESPONSE, VOCABULARY = 16, 4, 8, 4096
AT_ONCE = 8
"""Positions whose logits may be on the card at once, of 128."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    """A base whose logits are larger than all else that scoring makes."""
    return loaded(save_tiny_base(tmp_path_factory.mktemp("words") / "base", vocab_size=VOCABULARY))[0]


def prompts() -> list[list[int]]:
    return [[3 + row, *range(20, 19 + PROMPT)] for row in range(ROWS)]


def losses(base: LoadedBase) -> list[float]:
    """Return every response's NLL."""
    rows = [Example((*prompt, *range(30, 30 + RESPONSE)), PROMPT) for prompt in prompts()]
    sums: list[float] = scored_losses(base.model, pad_batch(rows, 0))[0].tolist()
    return sums


def choices(base: LoadedBase) -> list[float]:
    """Return the log-likelihoods of two continuations of every prompt."""
    harness = pytest.importorskip("flexperts.evaluation.harness")
    live = harness.LiveModel(base.model, base.tokenizer, harness.Forward(ROWS, "fp32"))
    ends = [[*range(30, 29 + RESPONSE), last] for last in (7, 8)]
    found = live._loglikelihood_tokens([(("", ""), prompt, end) for prompt in prompts() for end in ends])
    return [value for value, _ in found]


@pytest.mark.parametrize("score", [losses, choices])
def test_scores_need_the_logits_of_a_few_positions_at_a_time(
    base: LoadedBase, counts: Counts, monkeypatch: pytest.MonkeyPatch, score: Callable[[LoadedBase], list[float]]
) -> None:
    def scored() -> tuple[list[float], int]:
        gc.collect()
        before = Block.live
        counts.reset()
        return score(base), counts.peak - before

    expected, peak = scored()
    whole = ROWS * RESPONSE * VOCABULARY * 4
    assert peak > whole  # all of them fit half a gigabyte
    monkeypatch.setattr(chunked_losses, "MOST_BYTES", AT_ONCE * LOGIT_BYTES * VOCABULARY)
    found, peak = scored()
    assert peak < whole / 2
    assert found == pytest.approx(expected, abs=1e-3)
