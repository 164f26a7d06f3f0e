"""The matrix: families of tiny models in either storage type, and what ``matrix.toml`` says about them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from flexperts.testing import FAMILIES, tiny_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATRIX = tomllib.loads(Path(__file__).with_name("matrix.toml").read_text(encoding="utf-8"))
EVERY = {test for tests in MATRIX["properties"].values() for test in tests}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "families: the matrix of every MoE family; minutes; -m families")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on the families that the matrix gives it."""
    if "family" in metafunc.fixturenames:
        test = _name(metafunc.module.__name__, metafunc.function.__name__)
        metafunc.parametrize("family", [pytest.param(f, marks=_marks(test, f)) for f in _families(test)])


def _families(test: str) -> list[str]:
    return sorted(FAMILIES if test in EVERY else MATRIX["first"])


def _marks(test: str, family: str) -> list[pytest.MarkDecorator]:
    by_default = family in MATRIX["first"] or test in MATRIX["core"]
    return [] if by_default else [pytest.mark.families]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect the exceptions of the matrix to fail, each with its own error; one that passes is an error."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
        if not params or "family" not in params:
            continue
        test = _name(item.module.__name__, item.originalname)  # type: ignore[attr-defined]
        item.user_properties += [("test", test), ("family", params["family"])]
        for exception in MATRIX["exceptions"]:
            if _is_about(exception, test, params):
                error = pytest.RaisesExc(Exception, match=exception["error"])
                item.add_marker(pytest.mark.xfail(strict=True, raises=error, reason=exception["reason"]))


def _is_about(exception: dict[str, Any], test: str, params: dict[str, Any]) -> bool:
    if test not in exception["tests"] or params["family"] not in exception["families"]:
        return False
    return all(str(params[name]) == value for name, value in exception.get("only", {}).items())


def _name(module: str, function: str) -> str:
    """Return a test's name as ``matrix.toml`` writes it: ``grafting::a_silent_graft_is_the_base``."""
    return f"{module.rpartition('.')[2]}::{function}".replace("test_", "")


@pytest.fixture(params=sorted(DTYPES))
def model(family: str, request: pytest.FixtureRequest) -> Any:
    return tiny_model(family, dtype=DTYPES[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(0))
