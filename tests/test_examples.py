"""The examples run, on the tiny base."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SMALL = (
    "model.dtype=float32",
    "model.precision=fp32",
    "data.silos.train_rows=8",
    "data.silos.test_rows=4",
    "federation.rounds=1",
    "evaluation.max_new_tokens=4",
    "training.max_length=640",
)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(example: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example))["main"](tmp_path / "run", f"model.base={tiny_base}", *SMALL)
    printed = capsys.readouterr().out
    assert "zero_shot" in printed
    assert "global" in printed


def test_there_are_examples_and_the_quick_start_is_short() -> None:
    assert {"quickstart", "add_a_method"} <= {p.stem for p in EXAMPLES}
    assert len((EXAMPLES[0].parent / "quickstart.py").read_text().splitlines()) < 40
