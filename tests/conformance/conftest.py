"""The matrix: every family that is tested, as a tiny model in either storage type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexperts.testing import FAMILIES, tiny_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(DTYPES))
def model(family: str, request: pytest.FixtureRequest) -> Any:
    return tiny_model(family, dtype=DTYPES[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(0))
