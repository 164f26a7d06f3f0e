"""Kept moments in runs: where they are stored, who has which, and that they are never sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexperts.config.run import RunConfig
from flexperts.costs.plan import plan
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, PrivacyError
from flexperts.finished.joining import join
from flexperts.methods.flex import Flex
from flexperts.methods.kit.turn import Turn

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
KEPT = (
    "training.personal_moments=kept",
    "training.local_steps=2",
    "evaluation.max_new_tokens=1",
    "evaluation.rows=1",
)


def stored(run: Path, client: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a client's personal tensors and its moments, by their names in its file."""
    tensors = load_file(run / "personal" / f"{client}.safetensors")
    moments = {n.removeprefix("moments."): t for n, t in tensors.items() if n.startswith("moments.")}
    return {n: t for n, t in tensors.items() if not n.startswith("moments.")}, moments


@pytest.mark.parametrize("method", ["flex", "local", "local_lora", "ditto", "fedrep"])
def test_every_step_of_a_client_counts(recipe: Recipe, tmp_path: Path, method: str) -> None:
    """A client that missed a round continues with its own moments; fedrep's personal phase has half the steps."""
    config = recipe(*KEPT, f"method.name={method}", "federation.rounds=3", "federation.participation=0.5")
    run_federation(config, tmp_path / "run")
    rounds = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    trained = [name for log in rounds for name in log["clients"]]
    assert len({trained.count(name) for name in set(trained)}) > 1  # some missed more rounds than others
    for client in set(trained):
        personal, moments = stored(tmp_path / "run", client)
        assert moments.keys() == {f"{k}.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in personal}
        steps = {float(moments[f"step.{name}"]) for name in personal}
        assert steps == {trained.count(client) * (1 if method == "fedrep" else 2)}


def test_kept_moments_change_what_a_client_learns_from_its_second_round_on(recipe: Recipe, tmp_path: Path) -> None:
    losses = {}
    for name in ("kept", "fresh"):
        config = recipe(*KEPT, "method.name=local_lora", f"training.personal_moments={name}", "training.lr=0.02")
        run_federation(config, tmp_path / name)
        lines = (tmp_path / name / "rounds.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["clients"]["shop"]["loss"] for line in lines]
    # A round's mean loss is of before and after its first step: the second round's differs through its second step.
    assert losses["kept"][0] == losses["fresh"][0]
    assert losses["kept"][1] != losses["fresh"][1]
    assert not stored(tmp_path / "fresh", "shop")[1]


def test_the_plan_counts_them(recipe: Recipe, tmp_path: Path, tiny_base: Path) -> None:
    run_federation(recipe(*KEPT, "federation.rounds=1"), tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "personal" / "shop.safetensors").values()
    for setting in ("kept", "fresh"):
        (row,) = plan(str(tiny_base), ["flex"], [f"training.personal_moments={setting}"]).methods
        if setting == "kept":
            assert row.personal_state == sum(t.numel() * t.element_size() for t in tensors)
        else:
            assert row.personal_state == 4 * row.personal


@pytest.mark.parametrize("name", ["derived.moment", "moments.exp_avg"])
def test_a_method_cannot_send_them(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def outgoing(method: Flex, turn: Turn) -> Mapping[str, Tensor]:
        assert turn.moments
        largest = max(turn.moments.values(), key=torch.Tensor.numel)
        return {**turn.split.shared, name: largest.clone()}

    monkeypatch.setattr(Flex, "outgoing", outgoing)
    with pytest.raises(PrivacyError, match=r"personal bytes|not in the shared group"):
        run_federation(recipe(*KEPT), tmp_path / "run")


def test_sgd_has_none(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="personal_moments = 'kept' needs optimizer = 'adamw', not 'sgd'"):
        recipe(*KEPT, "training.optimizer=sgd")


def test_a_client_that_joins_later_stores_none(recipe: Recipe, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"instruction": f"Say {n}.", "response": f"{n}"} for n in range(6)]
    data = tmp_path / "bank.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    run_federation(recipe(*KEPT, "federation.rounds=1", "graft.output=difference"), tmp_path / "run")
    join(tmp_path / "run", data, steps=1)
    personal, moments = stored(tmp_path / "run", "bank")
    assert personal
    assert not moments
