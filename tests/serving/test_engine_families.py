"""Caches of other kinds: windows, compressed keys, states without columns; rows come and go in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexperts.testing import save_tiny_base

from .disturbed_run import Recipe, ask_in_waves, disturbed_run, everything, serving

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "deepseek_v3": {},  # compressed keys, LoRA on inputs of other shapes
    "qwen3_next": {},  # running states: rows share a batch from the start
    "deepseek_v32": {},  # an indexer: one row at a time
}
STEPS = {"gpt_oss": 3, "deepseek_v3": 3, "qwen3_next": 2, "deepseek_v32": 1}
"""At least so many rows in a mean step."""


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_come_and_go_get_the_answers_of_the_run(tmp_path: Path, family: str, recipe: Recipe) -> None:
    base = save_tiny_base(tmp_path / "base", family, **{"max_position_embeddings": 1024, **FAMILIES[family]})
    trained = disturbed_run(recipe, tmp_path / "run", f"model.base={str(base)!r}", "lora.projections=[]")
    asks = everything(trained)
    ordinary = [trained.generate(model.client, question, state=model.state) for model, question in asks]
    with serving(trained, max_rows=7) as engine:
        answers = ask_in_waves(engine, asks, 4)
        assert [asked.wait().strip() for asked in answers] == ordinary
        assert engine.counters.rows >= STEPS[family] * engine.counters.steps
    assert len(set(ordinary)) > len(trained.clients)
