"""Secure aggregation in whole runs on the tiny base, in this process and in worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.server.checkpoint import load_server

Recipe = Callable[..., RunConfig]
SHORT = ("evaluation.max_new_tokens=1", "evaluation.rows=1", "training.local_steps=2")
SECURE = ("privacy.aggregation=secure", "privacy.clip=100")


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def shared(folder: Path) -> Any:
    return load_server(folder / "server.safetensors").shared.vector


@pytest.mark.parametrize("method", ["flex", "fedadam", "ditto"])
def test_a_secure_run_ends_where_the_plain_one_does(recipe: Recipe, tmp_path: Path, method: str) -> None:
    """But for whole numbers in the place of floats, which training then carries on."""
    settings = (*SHORT, f"method.name={method}", "training.lr=1e-4")
    plain, secure = recipe(*settings), recipe(*settings, *SECURE)
    first = run_federation(plain, tmp_path / "plain")
    second = run_federation(secure, tmp_path / "secure")
    a, b = (shared(tmp_path / name) for name in ("plain", "secure"))
    assert np.abs(a - b).max() < 2e-6
    assert not np.array_equal(a, b)
    logs = rounds(tmp_path / "secure")
    assert [log["secure"]["exchanges"] for log in logs] == [2, 1]
    assert all(log["secure"]["norm"] < 100 for log in logs)
    assert all(not log["refused"] and len(log["clients"]) == 4 for log in logs)
    assert second["bytes"]["personal_sent"] == 0
    for name, scores in first["clients"].items():
        nll = scores["nll"]
        assert all(abs(its - second["clients"][name]["nll"][state]) < 1e-3 for state, its in nll.items())
