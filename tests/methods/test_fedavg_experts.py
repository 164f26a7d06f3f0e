"""LoRA on attention and on every expert: all of it common, sent and averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flexperts.client.client import Client, Request
from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.server.checkpoint import load_server

Recipe = Callable[..., RunConfig]
# The tiny base: 2 layers of 4 experts, hidden 32, intermediate 16, gate and up in one matrix.
EXPERT_VALUES_PER_RANK = 2 * 4 * ((32 + 2 * 16) + (16 + 32))


@pytest.mark.parametrize(("option", "rank"), [("", 8), ("method.options={rank=2}", 2)])
def test_everything_is_averaged_by_rows(recipe: Recipe, tmp_path: Path, option: str, rank: int) -> None:
    config = recipe("method.name=fedavg_experts", "training.lr=0.05", *([option] if option else []))
    workspace = Workspace(config)
    model = ClientModel(workspace.base, config, make_method(config.method))
    clinic, shop = (Client(name, workspace, model, tmp_path) for name in ("clinic", "shop"))
    start = clinic.initial(None)[0]
    assert np.array_equal(start.vector, shop.initial(None)[0].vector)
    updates = [client.train(Request(start, None, 1)).update for client in (clinic, shop)]
    parts = model.method.parts(model.site("clinic", []))
    model.close()
    experts = parts["experts"]
    assert isinstance(experts, ExpertAdapters)
    assert {expert.scale for layer in experts for expert in layer.values()} == {16.0 / 8}  # type: ignore[union-attr]

    attention = sum(t.numel() for n, t in start.tensors().items() if n.startswith("base_model."))
    assert start.size == attention + rank * EXPERT_VALUES_PER_RANK
    moved = [n for n, t in updates[0].tensors().items() if not torch.equal(t, start.tensors()[n])]
    assert any(n.startswith("experts.") for n in moved)
    assert not [n for n in start.manifest.names if "router" in n or ".gate." in n]

    server = Server(start, {"clinic": 5, "shop": 3})
    rows = {"clinic": 5, "shop": 3}
    model.method.aggregate(server, [type(u)(u.client, u.payload, rows[u.client], {}) for u in updates])
    wanted = (5 * updates[0].vector.astype(np.float64) + 3 * updates[1].vector.astype(np.float64)) / 8
    np.testing.assert_allclose(server.shared.vector, wanted, atol=1e-6)


def test_run_sends_all_and_learns_with_the_experts(recipe: Recipe, tmp_path: Path) -> None:
    more = ("training.lr=0.02", "evaluation.max_new_tokens=1")
    summary = run_federation(recipe("method.name=fedavg_experts", *more), tmp_path / "run")
    assert summary["mean"]["nll"]["global"] < summary["mean"]["nll"]["zero_shot"]
    shared = load_server(tmp_path / "run" / "checkpoint.safetensors").shared.tensors()
    Bs = [t for n, t in shared.items() if n.startswith("experts.") and n.endswith("_lora_B")]
    assert len(Bs) == 2 * 4 * 2
    assert sum(bool(B.count_nonzero()) for B in Bs) > 8
    assert not any(
        "experts" in n
        for n in make_method(recipe("method.name=fedavg_experts").method).adapter(
            load_server(tmp_path / "run" / "checkpoint.safetensors")
        )
    )
