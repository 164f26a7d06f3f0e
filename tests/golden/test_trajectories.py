"""No change of numbers goes unnoticed: every method's tiny run follows its recorded trajectory."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexperts.client.workspace import Workspace
from flexperts.methods.registry import method_names

_spec = importlib.util.spec_from_file_location("record", Path(__file__).with_name("record.py"))
assert _spec
assert _spec.loader
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)

REFERENCES: dict[str, Any] = json.loads(record.REFERENCES.read_text())


def numbers(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in a tree with its path."""
    if isinstance(tree, float):
        yield path, tree
    else:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, f"{path}/{key}")


def test_every_method_has_a_reference() -> None:
    assert sorted(REFERENCES) == sorted([*method_names(), record.PUBLISHED])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return record.shared_workspace(tmp_path_factory.mktemp("golden") / "base")


@pytest.mark.parametrize("name", record.RUNS)
def test_trajectory(name: str, workspace: Workspace, tmp_path: Path) -> None:
    """Processors differ by up to 6e-7, two settings of FLEx's graft by 3e-5."""
    made = record.trajectory(name, workspace, tmp_path / "run")
    found, expected = dict(numbers(made)), dict(numbers(REFERENCES[name]))
    assert len(expected) >= 12  # what a method without training has
    assert found == pytest.approx(expected, rel=5e-6)
