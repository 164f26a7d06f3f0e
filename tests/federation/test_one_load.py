"""Evaluation reads a client's stored state once for all states of its method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.parameters import store


def test_all_states_are_scored_from_one_load_and_as_one_at_a_time(
    recipe: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_federation(recipe("federation.rounds=1", "evaluation.rows=1"), tmp_path / "run")
    reads, read = list[str](), store.load_personal

    def counted(path: Any, **how: Any) -> Any:
        reads.append(Path(path).name)
        return read(path, **how)

    monkeypatch.setattr(store, "load_personal", counted)
    run = TrainedRun(tmp_path / "run")
    client, request, states = run.client("shop"), run.request("shop"), run.model.method.states
    apart = {state: client.evaluate(request, [state])[state] for state in states[::-1]}
    assert reads == ["shop.safetensors"] * len(states)
    reads.clear()
    together = client.evaluate(request, states)
    assert reads == ["shop.safetensors"]
    for state in states:
        assert together[state] == apart[state]
    assert together["global"].nlls != together["personalized"].nlls
    assert run.model.lent is None
    run.close()
