"""FedMoE: who holds which expert, the holder rule by hand, and what a client is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexperts.client.client import Client
from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.methods.fedmoe_style import FedMoEStyle, most_activated
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.parameters.vector import Payload
from flexperts.selection.selection import LayerScores

LORA, ROUTER = "base_model.q.lora_A.weight", "router.layers.moe"


def expert(number: int) -> str:
    return f"experts.layers.moe.{number}.up_lora_A"


def reply(client: str, rows: int, experts: dict[int, float], lora: float) -> Update:
    tensors = {expert(e): torch.full((2,), v) for e, v in experts.items()}
    tensors |= {ROUTER: torch.tensor([[v, -v] for v in experts.values()]), LORA: torch.full((2,), lora)}
    return Update(client, Payload.of(tensors), rows, {})


def make_server(held: dict[str, list[int]]) -> Server:
    start = {expert(e): torch.full((2,), 7.0) for e in range(4)}
    start |= {ROUTER: torch.full((4, 2), 7.0), LORA: torch.zeros(2)}
    return Server(Payload.of(start), {"a": 1, "b": 3, "c": 4}, {c: {"moe": h} for c, h in held.items()})


def test_nobody_one_and_several_holders() -> None:
    held = {"a": [0, 1], "b": [1, 2], "c": [0, 1]}
    server, method = make_server(held), FedMoEStyle()
    updates = [
        reply("a", 1, {0: 1.0, 1: 2.0}, 8.0),
        reply("b", 3, {1: 4.0, 2: 5.0}, 16.0),
        reply("c", 4, {0: 6.0, 1: 3.0}, 4.0),
    ]
    for update in updates:
        assert update.payload.manifest == method.uplink(server, update.client)
    method.aggregate(server, updates)
    expected = {0: (1 + 4 * 6) / 5, 1: (2 + 3 * 4 + 4 * 3) / 8, 2: 5.0, 3: 7.0}
    after = server.shared.tensors()
    for number, value in expected.items():
        assert after[expert(number)].tolist() == pytest.approx([value, value])
        row = [value, -value] if number != 3 else [7.0, 7.0]
        assert after[ROUTER][number].tolist() == pytest.approx(row)
    assert after[LORA].tolist() == pytest.approx([(8 + 3 * 16 + 4 * 4) / 8] * 2)
    sent = method.broadcast(server, "b").tensors()
    assert sent.keys() == {LORA, ROUTER, expert(1), expert(2)}
    assert torch.equal(sent[ROUTER], after[ROUTER][[1, 2]])


def test_the_most_activated_are_kept_and_never_too_few() -> None:
    counts = torch.tensor([5, 9, 0, 6], dtype=torch.float64)  # 10 tokens, two experts each
    scores = replace(LayerScores.empty("moe", 4), counts=counts, tokens=10)
    assert most_activated(scores, 0.5) == (1, 3)
    assert most_activated(scores, 0.75) == (0, 1, 3)
    assert most_activated(scores, 0.01) == (1, 3)


def test_an_expert_starts_alike_whoever_holds_it(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = recipe("method.name=fedmoe_style")
    workspace, method = Workspace(config), make_method(config.method)
    model = ClientModel(workspace.base, config, method)
    client = Client("clinic", workspace, model, tmp_path)
    report = json.loads(client.join()["report"])
    assert all(len(h) == 2 for h in report.values())
    start = client.initial(None)[0].tensors()
    assert len([n for n in start if n.startswith("experts.")]) == 2 * 4 * 4
    first = "experts.layers.model/layers/0/mlp/experts"
    assert len({start[f"{first}.{e}.up_lora_A"].sum().item() for e in range(4)}) == 4
    prepared = client.method.prepare(model.site("clinic", client.examples))
    site = model.site("clinic", client.examples, prepared)
    with model.lend(site, {}) as (split, _):
        own = {n: p for n, p in split.shared.items() if n.startswith("experts.")}
        assert len(own) == 2 * 2 * 4
        assert all(torch.equal(p, start[n]) for n, p in own.items())
    model.close()


def test_a_run_holds_halves_and_trains_only_held_rows(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = recipe("method.name=fedmoe_style", "training.local_steps=1", "evaluation.max_new_tokens=2")
    summary = run_federation(config, tmp_path / "run")
    trained = TrainedRun(tmp_path / "run")
    whole = trained.server.shared.size
    for client in trained.clients:
        held = trained.server.reports[client]
        payload = trained.request(client).payload
        assert payload.size < whole
        for layer, experts in held.items():
            assert payload.tensors()[f"router.layers.{layer}"].shape == (len(experts), 32)
    for layer in ("model/layers/0/mlp/experts", "model/layers/1/mlp/experts"):
        somebody = {e for report in trained.server.reports.values() for e in report[layer]}
        rows = trained.server.shared.tensors()[f"router.layers.{layer}"]
        assert {e for e in range(4) if rows[e].any()} == somebody
    nll = summary["mean"]["nll"]
    assert len({nll["zero_shot"], nll["global"], nll["personalized"]}) == 3
    trained.model.close()


def test_rows_that_are_not_held_stand_still(take_turn: Any) -> None:
    with take_turn("method.name=fedmoe_style", disturbed=False) as (method, turn):
        every = turn.site.experts
        site = replace(turn.site, prepared=method.initial_site(turn.site).prepared)
        choice = {e.name: (1, 3) for e in every}
        site = replace(site, prepared=replace(site.prepared, choice=choice))
        router = method.parts(site)["router"]
        for delta in router.parameters():
            (delta * 2).sum().backward()
            assert delta.grad.any(1).tolist() == [False, True, False, True]
