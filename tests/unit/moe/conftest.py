"""The families whose layout of routed experts is their own, and one of the many with the fused one."""

from __future__ import annotations

from typing import Any

import pytest

from flexperts.testing import tiny_model

FAMILIES = ("dbrx", "jetmoe", "llama4_text", "longcat_flash", "qwen3_moe")
TWO_EACH = {"llama4_text": {"num_experts_per_tok": 2}}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> Any:
    """A tiny model whose router chooses two experts for a token."""
    return tiny_model(family, **TWO_EACH.get(family, {}))
