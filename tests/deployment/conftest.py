"""Two silos with rows of their own, and the recipe that they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SILOS = ("clinic", "law_firm")


@pytest.fixture(scope="session")
def rows(silos: Path) -> dict[str, Path]:
    """Silo -> folder with its train and test rows."""
    return {name: silos / name for name in SILOS}


@pytest.fixture
def deployed(tmp_path: Path, tiny_model: str) -> Callable[..., Path]:
    """Return a function that writes a deployed run's recipe."""

    def write(rounds: int, deadline: float = 100, method: str = "flex") -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(
            f"""
            {tiny_model}
            [data]
            at_silos = true
            [method]
            name = "{method}"
            [training]
            max_length = 640
            local_steps = 3
            [federation]
            rounds = {rounds}
            min_clients = 2
            deadline = {deadline}
            [evaluation]
            max_new_tokens = 4
            """,
            encoding="utf-8",
        )
        return path

    return write
