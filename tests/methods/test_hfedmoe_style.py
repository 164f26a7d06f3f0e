"""HFedMoE: an expert's value, the budget, and both aggregation rules, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.methods.hfedmoe_style import ExpertBudget, HFedMoEStyle, routing_matrix, values_of
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload

INDEX = torch.tensor([[0, 1], [1, 2], [0, 2]])
WEIGHTS = torch.tensor([[0.6, 0.3], [0.7, 0.2], [0.1, 0.5]])
G = [[0.6, 0.3, 0.0, 0.0], [0.0, 0.7, 0.2, 0.0], [0.1, 0.0, 0.5, 0.0]]
LORA, ROUTER = "base_model.q.lora_A.weight", "router.layers.moe"


def value(column: list[float], lam: float, beta: float) -> float:
    mean = sum(column) / len(column)
    information = sum(g * math.log(g / mean) for g in column if g) / len(column)
    return lam * mean + (1 - lam) * max(column) - beta * information


@pytest.mark.parametrize(("lam", "beta"), [(0.5, 0.1), (1.0, 0.0), (0.0, 2.0), (0.3, 1.0)])
def test_the_value_of_an_expert_by_hand(lam: float, beta: float) -> None:
    routing = routing_matrix(INDEX, WEIGHTS, 4)
    assert routing.numpy() == pytest.approx(torch.tensor(G).numpy())
    expected = [value([row[e] for row in G], lam, beta) for e in range(4)]
    assert values_of(routing, lam, beta).tolist() == pytest.approx(expected, abs=1e-7)


def test_the_budget_takes_the_most_valuable_and_counts_once() -> None:
    """lam 1, beta 0: the means are 0.7, 1.0, 0.7, 0 thirds; a padded token would turn the order around."""
    budget = ExpertBudget(0.5, 1.0, 0.0)
    experts: Any = SimpleNamespace(name="moe", num_experts=4)
    model = torch.nn.Module()
    model.forward = lambda attention_mask: None
    padded = torch.cat([INDEX, torch.tensor([[3, 3]])]), torch.cat([WEIGHTS, torch.tensor([[9.0, 9.0]])])
    with budget.watching(model):
        model(attention_mask=torch.tensor([[1, 1, 1, 0]]))
        assert budget(experts, *padded) == {0, 1}
        assert budget(experts, *padded) == {0, 1}  # as checkpointing asks
        model(attention_mask=torch.tensor([[0, 0, 1, 0]]))
        assert budget(experts, *padded) == {0, 2}
    assert not model._forward_pre_hooks
    usage = budget.usage["moe"]
    assert usage.tokens == 4
    assert usage.batches == 2
    assert usage.learned.tolist() == [2, 1, 1, 0]
    assert usage.weight.tolist() == pytest.approx([0.8, 1.0, 1.2, 0.0])
    assert usage.score.tolist() == pytest.approx([0.7 / 3 + 0.1, 1 / 3, 0.7 / 3 + 0.5, 0.0])


def test_only_experts_in_the_budget_get_gradient(take_turn: Any) -> None:
    """One expert per layer and batch learns; with two steps at most two move, and what is sent says which."""
    with take_turn("method.name=hfedmoe_style", "method.options={budget=0.25}") as (method, turn):
        method.receive(turn)
        method.train(turn)
        sent = method.outgoing(turn)
        for layer in (f"model/layers/{i}/mlp/experts" for i in (0, 1)):
            start = f"experts.layers.{layer}."
            moved = {
                int(n.removeprefix(start).split(".")[0])
                for n, p in turn.split.shared.items()
                if n.startswith(start) and not torch.equal(p, turn.received[n])
            }
            learned = sent[f"derived.learned.{layer}"]
            assert moved == set(learned.nonzero().flatten().tolist())
            assert learned.sum() == 2
            assert not torch.equal(
                turn.split.shared[f"router.layers.{layer}"], turn.received[f"router.layers.{layer}"]
            )


def expert(number: int) -> str:
    return f"experts.layers.moe.{number}.up_lora_A"


def reply(
    client: str, rows: int, level: float, usage: list[float], score: list[float], learned: list[int]
) -> Update:
    tensors = {expert(e): torch.full((3,), level + e) for e in range(3)}
    tensors |= {ROUTER: torch.full((3, 2), level), LORA: torch.full((2,), level)}
    seen = {"usage": usage, "score": score, "learned": learned}
    tensors |= {f"derived.{n}.moe": torch.tensor(v, dtype=torch.float32) for n, v in seen.items()}
    return Update(client, Payload.of(tensors), rows, {})


def start() -> Server:
    tensors = {expert(e): torch.full((3,), -1.0) for e in range(3)}
    tensors |= {ROUTER: torch.full((3, 2), -1.0), LORA: torch.zeros(2)}
    return Server(Payload.of(tensors), {"a": 1, "b": 3})


def test_experts_and_routers_are_averaged_by_hand() -> None:
    """a counts for expert 0 alone, b for 0 and 1; nobody for 2: a never trained it, b used it too little."""
    server, method = start(), HFedMoEStyle(HFedMoEStyle.Options(tau=0.1))
    updates = [
        reply("a", 1, 10.0, [0.4, 0.05, 0.3], [0.5, 0.2, 0.1], [2, 1, 0]),
        reply("b", 3, 20.0, [0.2, 0.6, 0.05], [0.3, 0.7, 0.1], [1, 2, 1]),
    ]
    assert updates[0].payload.manifest == method.uplink(server, "a")
    method.aggregate(server, updates)
    after = server.shared.tensors()
    expected = {0: (10 + 3 * 20) / 4, 1: 21.0, 2: -1.0}
    assert {e: after[expert(e)][0].item() for e in range(3)} == pytest.approx(expected)
    a, b = 0.4 * 0.5, 0.2 * 0.3 + 0.6 * 0.7
    assert after[ROUTER].flatten().tolist() == pytest.approx([(a * 10 + b * 20) / (a + b)] * 6)
    assert after[LORA].tolist() == pytest.approx([(10 + 3 * 20) / 4] * 2)
    assert after.keys() == {LORA, ROUTER, *map(expert, range(3))}


def test_a_router_that_nobody_counts_for_stays() -> None:
    server, method = start(), HFedMoEStyle()
    method.aggregate(server, [reply("a", 1, 10.0, [0.4, 0.1, 0.3], [0.5, 0.2, 0.1], [0, 0, 0])])
    assert (server.shared.tensors()[ROUTER] == -1).all()


def test_a_run_trains_with_checkpointing(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    more = ("training.gradient_checkpointing=true", "training.micro_batch_size=2")
    config = recipe("method.name=hfedmoe_style", "training.local_steps=1", "evaluation.max_new_tokens=2", *more)
    summary = run_federation(config, tmp_path / "run")
    trained = TrainedRun(tmp_path / "run")
    routers = {n: t for n, t in trained.server.shared.tensors().items() if n.startswith("router.")}
    assert len(routers) == 2
    assert all(t.any() for t in routers.values())
    assert summary["mean"]["nll"]["global"] != summary["mean"]["nll"]["zero_shot"]
    trained.model.close()
