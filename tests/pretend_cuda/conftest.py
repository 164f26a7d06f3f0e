"""Every test here runs with two cards that are pretended; ``pytest -m pretend_cuda`` in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import backend
import card
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.pretend_cuda)


@pytest.fixture(scope="session", autouse=True)
def _cards() -> Iterator[None]:
    if backend.missing:
        pytest.skip(f"the stand-in for a card {backend.missing}")
    if str(torch.accelerator.current_accelerator()) != "cuda":
        pytest.fail("start these tests by themselves: pytest -m pretend_cuda, without -n")
    with card.pretended():
        yield


@pytest.fixture
def counts() -> card.Counts:
    """What happened on the cards in this test."""
    card.counts.reset()
    return card.counts
