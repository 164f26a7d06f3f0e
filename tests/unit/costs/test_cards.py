"""What fits a card: sums by hand, and what larger cards, smaller storage and lower ranks allow."""

from __future__ import annotations

import pytest

from flexperts.costs.cards import BATCHES, CONTEXT, FRAGMENTATION, CardPlanner, Fit, card_bytes
from flexperts.errors import ConfigError

GB = 10**9


@pytest.fixture(scope="module")
def planner() -> CardPlanner:
    return CardPlanner("smol-moe")


def by_name(planner: CardPlanner, card: int) -> dict[tuple[str, str], Fit]:
    return {(fit.storage, fit.rank): fit for fit in planner.fits(card)}


def test_every_storage_and_rank_is_planned(planner: CardPlanner) -> None:
    assert {*by_name(planner, 24 * GB)} == {(s, r) for s in ("bf16", "int8", "nf4") for r in ("full", "32")}


def test_memory_by_hand(planner: CardPlanner) -> None:
    fit = by_name(planner, 0)["bf16", "full"]  # nothing fits, so one row is planned
    assert (fit.rows, fit.evaluation_rows, fit.on(0)) == (0, 0, False)
    assert fit.base == 2 * planner.facts.parameters
    largest = max(p.numel() for p in planner._base.model.parameters())
    assert fit.loading == CONTEXT + fit.base + 2 * 2 * largest
    _, planned = planner._planned["full"]
    memory = planned.memory
    least = fit.base + (1 + FRAGMENTATION) * (memory.added + memory.gradients + memory.moments) + CONTEXT
    assert least < fit.training < least + 4 * GB


def test_what_is_said_to_fit_does_and_one_batch_more_does_not(planner: CardPlanner) -> None:
    for card in (3 * GB, 6 * GB, 24 * GB):
        for (_, rank), fit in by_name(planner, card).items():
            assert fit.rows in (0, *BATCHES)
            if fit.rows:
                assert fit.training <= card
            if fit.rows and fit.rows < BATCHES[0] and not fit.checkpointing:
                config, planned = planner._planned[rank]
                assert planner._need(config, planned, fit.base, 2 * fit.rows, False)[0] > card


def test_more_memory_and_smaller_storage_never_allow_less(planner: CardPlanner) -> None:
    small, large = by_name(planner, 3 * GB), by_name(planner, 24 * GB)
    assert all(large[key].rows >= small[key].rows for key in small if not small[key].checkpointing)
    for rank in ("full", "32"):
        bases = [large[storage, rank].base for storage in ("bf16", "int8", "nf4")]
        assert bases == sorted(bases, reverse=True)
        assert len(set(bases)) == 3


def test_a_method_without_personal_parameters_has_one_rank() -> None:
    planner = CardPlanner("smol-moe", ["method.name=fedavg"])
    assert {fit.rank for fit in planner.fits(24 * GB)} == {"full"}


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * GB), ("80GiB", 80 * 2**30), ("24 GB", 24 * GB)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert card_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24", "many", "-4GB", "500MB"])
def test_what_is_no_card_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu .*above 1 GB"):
        card_bytes(text)
