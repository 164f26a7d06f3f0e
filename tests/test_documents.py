"""Pages that show measured numbers show those of the raw files that are committed beside them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_comparison_shows_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "benchmarks" / "methods_table.py")
    assert spec
    assert spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    entries = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text())["entries"]
    assert len(entries) >= 30
    assert benchmark.table(entries) in (ROOT / "docs" / "comparison.md").read_text()
