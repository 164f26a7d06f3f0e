"""One silo on the tiny base, and the recipe that it is handed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.deployment.settings import at_silos
from flexperts.recipe import load_silo


@pytest.fixture
def silo_file(tmp_path: Path, silos: Path, tiny_base: Path) -> Path:
    """The file of the silo `clinic`, whose state folder lies beside it."""
    path = tmp_path / "silo.toml"
    path.write_text(
        f"""
        name = "clinic"
        state = "state"
        base = "{tiny_base}"
        dtype = "float32"
        device = "cpu"
        [data]
        train = "{silos / "clinic" / "train.jsonl"}"
        test = "{silos / "clinic" / "test.jsonl"}"
        [policy]
        min_score_rows = 1
        """
    )
    return path


@pytest.fixture
def silo(silo_file: Path) -> SiloConfig:
    return load_silo(silo_file)


@pytest.fixture
def handed(recipe: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Return a function that makes the recipe that a server hands out; its base is nobody's."""

    def make(*overrides: str) -> RunConfig:
        return at_silos(recipe("training.local_steps=2", "model.base=the-servers-name", *overrides))

    return make
