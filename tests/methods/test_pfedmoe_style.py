"""pFedMoE-style: only G is in messages, only the pairs train, and the global state is G alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flexperts.artifacts import RunDirectory
from flexperts.engines.run import run_federation
from flexperts.server.checkpoint import load_server


def test_only_g_is_shared_and_only_the_pairs_train(take_turn: Any) -> None:
    with take_turn("method.name=pfedmoe_style", disturbed=False) as (method, turn):
        pair = "gated.layers.model/layers/{}/mlp/experts."
        leaves = {"shared": ("shared.down", "shared.up")}
        leaves["personal"] = ("personal.down", "personal.up", "gate.W1", "gate.W2")
        for group, suffixes in leaves.items():
            assert set(vars(turn.split)[group]) == {pair.format(i) + s for i in (0, 1) for s in suffixes}
        frozen = {n: p.detach().clone() for n, p in turn.split.frozen.items()}
        assert any("lora_A" in n for n in frozen)
        before = {n: p.detach().clone() for n, p in turn.split.trained.items()}
        for _ in range(2):
            method.train(turn)
        assert all(torch.equal(p, frozen[n]) for n, p in turn.split.frozen.items())
        assert not any(torch.equal(p, before[n]) for n, p in turn.split.trained.items())
        assert set(method.outgoing(turn)) == set(turn.split.shared)


def test_the_global_state_is_g_alone_at_full_weight(take_turn: Any) -> None:
    """By hand on each layer: y = MoE(x) + (alpha / r) up (down x), alpha / r = 6 / 3."""
    options = "method.options={rank=3, alpha=6.0, gate_width=5}"
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    index, weights = torch.tensor([[1, 2]]).expand(7, 2), torch.tensor([[0.6, 0.3]]).expand(7, 2)
    with take_turn("method.name=pfedmoe_style", options) as (method, turn), torch.no_grad():
        outputs: dict[str, list[Any]] = {}
        for state in ("zero_shot", "global", "personalized"):
            with method.in_state(turn, state):
                outputs[state] = [e.module(hidden, index, weights) for e in turn.site.experts]
        for i, experts in enumerate(turn.site.experts):
            p = {n.split("experts.")[1]: t for n, t in turn.split.trained.items() if f"layers/{i}/" in n}
            shared, own = (2.0 * hidden @ p[f"{k}.down"].T @ p[f"{k}.up"].T for k in ("shared", "personal"))
            gate = torch.softmax(torch.sigmoid(hidden @ p["gate.W1"].T) @ p["gate.W2"].T, -1)
            base = outputs["zero_shot"][i]
            turn.parts["gated"].detach()
            assert torch.equal(base, experts.module(hidden, index, weights))
            turn.parts["gated"].attach()
            assert torch.allclose(outputs["global"][i], base + shared, atol=1e-5)
            mixed = gate[:, :1] * shared + gate[:, 1:] * own
            assert torch.allclose(outputs["personalized"][i], base + mixed, atol=1e-5)
        assert not any(m._forward_hooks for m in turn.parts["gated"].modules())


def test_a_run_sends_g_only(recipe: Any, tmp_path: Path) -> None:
    config = recipe("method.name=pfedmoe_style", "training.lr=0.02", "evaluation.max_new_tokens=2")
    summary = run_federation(config, tmp_path / "run")
    server = load_server(RunDirectory.open(tmp_path / "run").checkpoint)
    assert {n.rsplit(".", 2)[1] for n in server.shared.manifest.names} == {"shared"}
    log = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[0])
    assert set(log["declared"]["uplink"].values()) == {
        4 * 2 * 2 * 8 * 32
    }  # fp32, 2 layers, down and up, r = 8, D = 32
    own = load_file(tmp_path / "run" / "personal" / "shop.safetensors")
    assert {n.rsplit(".", 2)[1] for n in own} == {"personal", "gate"}
    assert not (tmp_path / "run" / "shared").exists()
    nll = summary["mean"]["nll"]
    assert len({nll["zero_shot"], nll["global"], nll["personalized"]}) == 3
