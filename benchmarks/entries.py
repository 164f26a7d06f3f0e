"""Runs of the scripts here that compare entries: where each is, and what is kept of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from flexperts.client.workspace import Workspace
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe

_HEAVY = ("personal", "shared", "copies", "checkpoint.safetensors", "predictions")


def run_entry(recipe: Path, folder: Path, settings: Iterable[str], workspace: Workspace | None) -> Workspace:
    """Run a recipe without its reference, keep the run's small files, and return the workspace for the next one."""
    config = load_recipe(recipe, settings)
    config = config.model_copy(update={"method": config.method.model_copy(update={"reference": None})})
    workspace = workspace or Workspace(config)
    run_federation(config, folder, resume=True, workspace=workspace)
    for path in (folder / name for name in _HEAVY):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return workspace


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Return the run directory of an entry with a seed."""
    return out / "".join(c if c.isalnum() else "-" for c in name) / f"seed-{seed}"
