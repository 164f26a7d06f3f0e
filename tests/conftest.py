"""Fixtures that several test folders share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexperts.config.run import RunConfig
from flexperts.methods import registry
from flexperts.recipe import parse_recipe
from flexperts.testing import save_tiny_base

# Tiny matrices gain nothing from threads, and tests that run side by side would wait for each other's.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny qwen2_moe with a byte tokenizer and a chat template."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny", max_position_embeddings=1024)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the methods that a test registers."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_LOADED", dict(registry._LOADED))


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skip where the sandbox of ``flexperts silo units`` cannot run."""
    if missing := [tool for tool in ("bwrap", "socat") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    words = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    tried = subprocess.run(words, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")


@pytest.fixture(scope="session")
def recipe(tiny_base: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a recipe of a few seconds on the tiny base, with overrides on top."""

    def make(*overrides: str) -> RunConfig:
        text = f"""
            [model]
            base = "{tiny_base}"
            dtype = "float32"
            precision = "fp32"
            [data.silos]
            train_rows = 8
            test_rows = 4
            [training]
            max_length = 640
            [federation]
            rounds = 2
            [evaluation]
            max_new_tokens = 4
        """
        return parse_recipe(text, overrides)

    return make
