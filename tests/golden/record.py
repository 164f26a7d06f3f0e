"""Records the golden trajectories: losses and scores of a tiny run of each method.

    python tests/golden/record.py        # after a change that is meant to change numbers; say why in the commit

Rounding differs between processors, so tests compare with a tolerance far below what a real change does.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.methods.registry import method_names
from flexperts.recipe import parse_recipe
from flexperts.testing import METHOD_SETTINGS, save_tiny_base

REFERENCES = Path(__file__).with_name("trajectories.json")
_RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[method]
name = "fedavg"
[data.silos]
train_rows = 8
test_rows = 4
[training]
max_length = 640
lr = 0.02
[federation]
rounds = 3
[evaluation]
every = 1
max_new_tokens = 2
"""


PUBLISHED = "flex as published"
RUNS: dict[str, tuple[str, ...]] = {
    **{name: (f"method.name={name}", *METHOD_SETTINGS.get(name, ())) for name in method_names()},
    PUBLISHED: ("method.name=flex", "graft.output=expert", "training.personal_moments=fresh"),
}
"""Name of a run -> its settings: every method, and FLEx without the defaults of ours."""


def shared_workspace(folder: Path) -> Workspace:
    """Save the base of all runs in a new folder, and return it with their rows."""
    return Workspace(_recipe(save_tiny_base(folder, max_position_embeddings=1024)))


def trajectory(name: str, workspace: Workspace, out: Path) -> dict[str, Any]:
    """Return losses and NLL of every round and client of a tiny run."""
    run_federation(_recipe(workspace.config.model.base, *RUNS[name]), out, workspace=workspace)
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return {
        "loss": [{n: c["loss"] for n, c in r["clients"].items()} for r in rounds],
        "nll": [
            {n: {k: v for k, v in s.items() if k.startswith("nll")} for n, s in r["scores"].items()} for r in rounds
        ],
    }


def _recipe(base: Path | str, *settings: str) -> RunConfig:
    return parse_recipe(_RECIPE.format(base=base), settings)


def record() -> None:
    """Write the references anew."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = shared_workspace(Path(folder) / "base")
        made = {name: trajectory(name, workspace, Path(folder) / name) for name in RUNS}
    REFERENCES.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    record()
