"""Export of a short run on the real base in bfloat16, each form checked in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from flexperts.engines.run import run_federation
from flexperts.export.exporting import export_run
from flexperts.recipe import parse_recipe

pytestmark = pytest.mark.slow
RECIPE = """
[model]
base = "smol-moe"
[data.silos]
train_rows = 8
test_rows = 4
[training]
local_steps = 4
lr = 2e-3
personal_lr = 6e-3
[federation]
rounds = 1
[evaluation]
rows = 1
max_new_tokens = 2
"""


def test_every_form_of_a_run_on_the_real_base(tmp_path: Path) -> None:
    run_federation(parse_recipe(RECIPE), tmp_path / "run")
    for form in ("transformers", "merged", "adapter", "personal"):
        done = export_run(tmp_path / "run", tmp_path / form, client="clinic", form=form)
        assert done.difference is not None
        # Adapters and grafts are stored as the run computes with them; merging rounds.
        assert done.difference.relative < (0.1 if form in ("transformers", "merged") else 1e-3)
    whole = export_run(tmp_path / "run", tmp_path / "fp32", client="clinic", dtype="float32")
    assert whole.difference is not None
    assert whole.difference.relative < 1e-5
    assert sum(t.numel() for t in load_file(tmp_path / "personal" / "graft.safetensors").values()) < 2e6
