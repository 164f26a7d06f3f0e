"""Two silos with rows of their own, and the recipe that they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexperts.data.silos.generate import write_silos

SILOS = ("clinic", "law_firm")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Silo -> folder with its train and test rows."""
    folder = tmp_path_factory.mktemp("rows")
    write_silos(folder, 0, 8, 4)
    return {name: folder / name for name in SILOS}


@pytest.fixture
def deployed(tmp_path: Path, tiny_base: Path) -> Callable[..., Path]:
    """Return a function that writes a deployed run's recipe."""

    def write(rounds: int, deadline: float = 100, method: str = "flex") -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(
            f"""
            [model]
            base = "{tiny_base}"
            dtype = "float32"
            precision = "fp32"
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
