"""zero_shot, local_lora, centralized: what they leave out is what they are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexperts.client.client import Client
from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.methods.registry import make_method

Recipe = Callable[..., RunConfig]

SHORT = "evaluation.max_new_tokens=1"


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def states(summary: dict[str, Any]) -> set[str]:
    return {state for state, value in summary["mean"]["nll"].items() if value is not None}


def test_zero_shot_trains_nobody_and_scores_the_base(recipe: Recipe, tmp_path: Path) -> None:
    summary = run_federation(recipe("method.name=zero_shot", "method.reference=fedavg", SHORT), tmp_path / "run")
    assert states(summary) == {"zero_shot"}
    assert [(r["clients"], r["uplink"], r["downlink"]) for r in rounds(tmp_path / "run")] == [({}, {}, {})] * 2
    assert summary["mean"]["nll"]["zero_shot"] == summary["reference"]["mean"]["nll"]["zero_shot"]
    assert not (tmp_path / "run" / "shared").exists()
    for path in (tmp_path / "run" / "personal").glob("*.safetensors"):
        assert not load_file(path)


def test_local_lora_is_a_federation_of_one(recipe: Recipe, tmp_path: Path) -> None:
    """A client's personal LoRA is what FedAvg gives it when no other client ever takes part."""
    local = run_federation(recipe("method.name=local_lora", "training.lr=0.02", SHORT), tmp_path / "local")
    assert states(local) == {"zero_shot", "personalized"}
    assert local["mean"]["nll"]["personalized"] < local["mean"]["nll"]["zero_shot"]
    assert not (tmp_path / "local" / "shared").exists()
    assert all(set(r["declared"]["uplink"].values()) == {0} for r in rounds(tmp_path / "local"))
    config = recipe("method.name=fedavg", "training.lr=0.02", "federation.participation=0.01", SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexperts.methods.kit.method.Method.participants", lambda self, server, sampled: ["shop"])
        run_federation(config, tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "shared" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "local" / "personal" / "shop.safetensors")
    assert kept.keys() == alone.keys()
    assert all(torch.allclose(kept[name], alone[name], atol=1e-6) for name in alone)
    assert any(not torch.equal(kept[n], load_file(p)[n]) for p in kept_by_others(tmp_path) for n in kept)


def kept_by_others(folder: Path) -> list[Path]:
    found = [p for p in (folder / "local" / "personal").glob("*.safetensors") if "shop" not in p.name]
    return [p for p in found if ".before" not in p.name]


def test_centralized_is_one_trainer_with_all_rows_and_all_steps(recipe: Recipe, tmp_path: Path) -> None:
    summary = run_federation(recipe("method.name=centralized", "training.lr=0.02", SHORT), tmp_path / "run")
    assert states(summary) == {"zero_shot", "global"}
    assert summary["mean"]["nll"]["global"] < summary["mean"]["nll"]["zero_shot"]
    assert all(client["nll"]["global"] is not None for client in summary["clients"].values())
    fedavg = run_federation(recipe("method.name=fedavg", "training.lr=0.02", SHORT), tmp_path / "fedavg")
    assert list(fedavg["clients"]) == ["clinic", "help_desk", "law_firm", "shop"]
    for pooled, apart in zip(rounds(tmp_path / "run"), rounds(tmp_path / "fedavg"), strict=True):
        assert list(pooled["clients"]) == ["clinic"]
        assert pooled["clients"]["clinic"]["rows"] == sum(c["rows"] for c in apart["clients"].values()) == 32
        for what in ("steps", "tokens"):
            assert pooled["clients"]["clinic"][what] == sum(c[what] for c in apart["clients"].values())


def test_centralized_sees_every_row_of_every_client_and_ignores_participation(
    recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe("method.name=centralized", "federation.participation=0.25", "training.local_steps=3")
    workspace = Workspace(config)
    method = make_method(config.method)
    model = ClientModel(workspace.base, config, method)
    client = Client("shop", workspace, model, tmp_path)
    own = [example for name in workspace.clients for example in workspace.examples(name)]
    assert sorted(e.input_ids for e in client.examples) == sorted(e.input_ids for e in own)
    assert client._local_settings(2).steps == 12
    assert client._local_settings(2).first_step == 12
    assert client._local_settings(2).total_steps == 24
    model.close()
