"""FedMoE-DA: the mixing matrix by hand, what is mixed, and what a client gets back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.methods.fedmoe_da import FedMoEDA, mixing
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload

LORA, ROUTER, PROXY = "base_model.q.lora_A.weight", "router.layers.moe", "derived.router_rows.moe"


def by_hand(rows: list[list[float]], peers: int, tau: float) -> list[list[float]]:
    def cos(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    result = []
    for i, row in enumerate(rows):
        others = sorted((j for j in range(len(rows)) if j != i), key=lambda j: -cos(row, rows[j]))[:peers]
        exp = {j: math.exp((1.0 if j == i else cos(row, rows[j])) / tau) for j in [i, *others]}
        result.append([exp.get(j, 0.0) / sum(exp.values()) for j in range(len(rows))])
    return result


@pytest.mark.parametrize(("peers", "tau"), [(0, 1.0), (1, 1.0), (2, 0.3), (9, 2.0)])
def test_the_mixing_matrix_by_hand(peers: int, tau: float) -> None:
    rows = [[1.0, 0.2, 0.0], [0.9, 0.4, 0.1], [-1.0, 0.3, 0.5], [0.0, 1.0, -2.0], [2.0, 0.4, 0.3]]
    assert mixing(torch.tensor(rows), peers, tau).numpy() == pytest.approx(
        torch.tensor(by_hand(rows, peers, tau)).numpy(), abs=1e-6
    )


def test_an_expert_is_always_among_its_own_peers() -> None:
    """All rows equal: every expert ties with itself, and keeps itself and one other."""
    mix = mixing(torch.ones(4, 3), 1, 1.0)
    assert mix.diagonal().tolist() == pytest.approx([0.5] * 4)
    assert ((mix > 0).sum(1) == 2).all()


def expert(number: int) -> str:
    return f"experts.layers.moe.{number}.up_lora_A"


def reply(client: str, values: tuple[float, float], lora: float, rows: Tensor | None, n: int) -> Update:
    tensors = {expert(e): torch.full((3,), v) for e, v in enumerate(values)}
    tensors |= {ROUTER: torch.full((2, 2), lora), LORA: torch.full((2,), lora)}
    return Update(client, Payload.of(tensors | ({PROXY: rows} if rows is not None else {})), n, {})


def test_experts_of_all_clients_are_mixed_and_the_router_stays_ones_own() -> None:
    start = {expert(e): torch.zeros(3) for e in (0, 1)} | {ROUTER: torch.zeros(2, 2), LORA: torch.zeros(2)}
    server = Server(Payload.of(start), {"a": 1, "b": 3, "c": 2})
    method = FedMoEDA(FedMoEDA.Options(peers=1, every=2))
    rows = {"a": [[1.0, 0.0], [0.0, 1.0]], "b": [[1.0, 0.1], [-1.0, 0.2]]}
    updates = [reply("a", (1.0, 2.0), 4.0, torch.tensor(rows["a"]), 1)]
    updates += [reply("b", (3.0, 4.0), 8.0, torch.tensor(rows["b"]), 3)]
    assert updates[0].payload.manifest == method.uplink(server, "a")
    method.aggregate(server, updates)
    mix = torch.tensor(by_hand(rows["a"] + rows["b"], 1, 1.0), dtype=torch.float64)
    mixed = (mix @ torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).tolist()
    for client, values, own in (("a", mixed[:2], 4.0), ("b", mixed[2:], 8.0), ("c", [0.0, 0.0], 0.0)):
        sent = method.broadcast(server, client).tensors()
        assert sent.keys() == start.keys()
        assert [sent[expert(e)][0].item() for e in (0, 1)] == pytest.approx(values, rel=1e-6)
        assert sent[ROUTER].tolist() == [[own, own]] * 2
        assert sent[LORA].tolist() == pytest.approx([(4 + 3 * 8) / 4] * 2)

    server.round = 1  # the weights stand for a second round, in which b alone takes part
    second = reply("b", (5.0, 6.0), 8.0, None, 3)
    assert second.payload.manifest == method.uplink(server, "b")
    method.aggregate(server, [second])
    again = (mix @ torch.tensor([*mixed[:2], 5.0, 6.0], dtype=torch.float64)).tolist()
    for client, values in (("a", mixed[:2]), ("b", again[2:])):
        sent = method.broadcast(server, client).tensors()
        assert [sent[expert(e)][0].item() for e in (0, 1)] == pytest.approx(values, rel=1e-6)


def test_a_run_gives_every_client_its_own_experts(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    options = "method.options={every=2, peers=2}"
    summary = run_federation(
        recipe("method.name=fedmoe_da", options, "training.local_steps=1", "evaluation.max_new_tokens=2"),
        tmp_path / "run",
    )
    trained = TrainedRun(tmp_path / "run")
    base = {n: t for n, t in trained.workspace.base.model.state_dict().items() if n.endswith("mlp.gate.weight")}
    first, second = (trained.request(c).payload.tensors() for c in trained.clients[:2])
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) == name.startswith("base_model."), name
    for layer in (0, 1):
        stored = trained.server.memory[f"own.clinic.derived.router_rows.model/layers/{layer}/mlp/experts"]
        frozen = base[f"model.layers.{layer}.mlp.gate.weight"]
        assert (stored - frozen).abs().max() > 0
        assert torch.allclose(stored, frozen, atol=0.05)
    nll = summary["mean"]["nll"]
    assert len({nll["zero_shot"], nll["global"], nll["personalized"]}) == 3
    trained.model.close()
