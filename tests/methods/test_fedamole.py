"""FedAMoLE: the assignment against all assignments, what is averaged, and what a client is sent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig, TrainingConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.finished.trained import TrainedRun
from flexperts.methods.fedamole import FedAMoLE, affinity, assign_experts, balanced
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload

SITE = "mixture.sites.q"


@pytest.mark.parametrize(
    ("experts", "clients", "each", "least", "most"),
    [(3, 3, 1, 1, 1), (4, 3, 2, 2, 3), (4, 3, 1, 0, 2), (2, 4, 2, 1, 1)],
)
def test_the_assignment_is_the_best_of_all(experts: int, clients: int, each: int, least: int, most: int) -> None:
    for seed in range(5):
        gain = torch.rand(experts, clients, generator=torch.Generator().manual_seed(seed))
        best = -1.0
        for rows in itertools.product(itertools.combinations(range(clients), each), repeat=experts):
            load = [sum(i in row for row in rows) for i in range(clients)]
            if all(least <= n <= most for n in load):
                best = max(best, sum(float(gain[e, i]) for e, row in enumerate(rows) for i in row))
        found = assign_experts(gain, each, least, most)
        assert set(found.unique().tolist()) <= {0.0, 1.0}
        assert found.sum(1).tolist() == [each] * experts
        assert all(least <= n <= most for n in found.sum(0).tolist())
        assert float((gain * found).sum()) == pytest.approx(best, abs=1e-5)


def test_affinity_is_a_softmax_over_clients() -> None:
    experts, tokens = [[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]], [[0.3, 0.1], [-1.0, 2.0]]
    scores = [[sum(a * b for a, b in zip(e, t, strict=True)) / math.sqrt(2) for t in tokens] for e in experts]
    expected = [[math.exp(s) / sum(map(math.exp, row)) for s in row] for row in scores]
    assert affinity(torch.tensor(experts), torch.tensor(tokens)).flatten().tolist() == pytest.approx(
        [q for row in expected for q in row]
    )


def make() -> tuple[FedAMoLE, Server]:
    tensors = {f"{SITE}.experts.{e}.A": torch.full((2, 3), 9.0) for e in range(3)}
    tensors |= {f"{SITE}.projection": torch.zeros(2, 3), f"{SITE}.shared.A": torch.zeros(2, 3)}
    server = Server(Payload.of(tensors), {"a": 1, "b": 3, "c": 2})
    method = FedAMoLE(FedAMoLE.Options(experts=3, clients_per_expert=1, min_experts=1, max_experts=1))
    method.start(server)
    server.memory["assigned.q"] = torch.eye(3)  # a holds 0, b holds 1, c holds 2
    return method, server


def reply(client: str, held: int, level: float, embedding: list[float], tokens: list[float], rows: int) -> Update:
    names = (f"{SITE}.experts.{held}.A", f"{SITE}.projection", f"{SITE}.shared.A")
    derived = {f"derived.expert.q.{held}": torch.tensor(embedding), "derived.tokens.q": torch.tensor(tokens)}
    return Update(client, Payload.of({n: torch.full((2, 3), level) for n in names} | derived), rows, {})


def test_holders_are_averaged_and_experts_move_to_who_fits_them() -> None:
    """Each expert's embedding points to the next client's tokens, so every expert moves one on; c was absent."""
    method, server = make()
    server.memory["derived.tokens.q.c"] = torch.tensor([-5.0, -5.0])
    server.memory["derived.expert.q.2"] = torch.tensor([9.0, -1.0])
    updates = [reply("a", 0, 1.0, [0.0, 9.0], [9.0, 0.0], 1), reply("b", 1, 2.0, [-9.0, -9.0], [0.0, 9.0], 3)]
    assert updates[0].payload.manifest == method.uplink(server, "a")
    method.aggregate(server, updates)
    after = server.shared.tensors()
    assert [after[f"{SITE}.experts.{e}.A"][0, 0].item() for e in range(3)] == [1.0, 2.0, 9.0]
    for name in (f"{SITE}.projection", f"{SITE}.shared.A"):
        assert after[name][0, 0].item() == pytest.approx((1 + 3 * 2) / 4)
    for client, expert in (("a", 2), ("b", 0), ("c", 1)):
        sent = method.broadcast(server, client).tensors()
        assert sent.keys() == {f"{SITE}.experts.{expert}.A", f"{SITE}.projection", f"{SITE}.shared.A"}


def test_an_assignment_that_cannot_be_is_refused() -> None:
    _, server = make()
    for options in ({"clients_per_expert": 4}, {"experts": 2, "min_experts": 2}, {"experts": 12, "max_experts": 2}):
        with pytest.raises(ConfigError, match="each client holds"):
            FedAMoLE(FedAMoLE.Options(**options)).check_clients(server.clients)


def test_only_held_experts_train_and_embeddings_are_means(take_turn: Any) -> None:
    """With aux = 1 the embeddings are means over all tokens of all train rows."""
    options = "method.options={experts=5, aux=1.0}"
    with take_turn("method.name=fedamole", options) as (method, turn):
        lora = turn.site.lora
        held = {n: {i % 5, (i + 2) % 5} for i, n in enumerate(lora.targets)}
        keys = {n: n.replace(".", "/") for n in lora.targets}
        absent = {f"mixture.sites.{keys[n]}.experts.{e}." for n in held for e in set(range(5)) - held[n]}
        received = {n: t for n, t in turn.received.items() if not n.startswith(tuple(absent))}
        turn = replace(turn, received=received)
        before = {n: p.detach().clone() for n, p in turn.split.shared.items()}
        method.receive(turn)
        method.train(turn)
        moved = {n for n, p in turn.split.shared.items() if not torch.equal(p, before[n])}
        assert moved
        assert moved <= received.keys()
        for n, experts in held.items():
            assert {f"mixture.sites.{keys[n]}.experts.{e}.B" for e in experts} <= moved
        sent = method.outgoing(turn)
        assert {n for n in sent if not n.startswith("derived.")} == received.keys()
        inputs: dict[str, list[torch.Tensor]] = {}
        first = lora.targets[0]
        handle = lora.module(first).register_forward_pre_hook(
            lambda _m, args: inputs.setdefault(first, []).append(args[0][0].double())
        )
        with torch.no_grad():
            for row in turn.site.examples:
                lora.base(input_ids=torch.tensor([row.input_ids]))
        handle.remove()
        mean = torch.cat(inputs[first]).mean(0)
        start = f"mixture.sites.{keys[first]}"
        for e in held[first]:
            by_hand = turn.split.shared[f"{start}.experts.{e}.A"].detach().double() @ mean
            assert torch.allclose(sent[f"derived.expert.{keys[first]}.{e}"].double(), by_hand, atol=1e-5)
        by_hand = turn.split.shared[f"{start}.projection"].detach().double() @ mean
        assert torch.allclose(sent[f"derived.tokens.{keys[first]}"].double(), by_hand, atol=1e-5)


def test_the_balance_loss_is_in_the_gradient_and_not_in_the_value() -> None:
    """Two parts of one batch: each adds half of weight x balance, whose gradient at x is 2x."""
    x = torch.tensor(3.0, requires_grad=True)

    def objective(*_: Any) -> Iterator[torch.Tensor]:
        yield from (5 * x, 7 * x)

    mixture: Any = type("Mixture", (), {"balance_loss": lambda _self: x * x})()
    settings: Any = type("Settings", (), {"training": TrainingConfig(micro_batch_size=2)})()
    parts = list(balanced(objective, mixture, 0.1)(torch.nn.Module(), [None] * 4, settings))
    assert [p.item() for p in parts] == pytest.approx([15.0, 21.0])
    sum(parts).backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(5 + 7 + 0.1 * 2 * 3)


def test_a_run_keeps_to_the_rules_of_assignment(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    options = "method.options={experts=4, min_experts=1, max_experts=3}"
    config = recipe("method.name=fedamole", options, "training.local_steps=1", "evaluation.max_new_tokens=2")
    run_federation(config, tmp_path / "run")
    trained = TrainedRun(tmp_path / "run")
    tables = {n: t for n, t in trained.server.memory.items() if n.startswith("assigned.")}
    assert len(tables) == 6
    for name, table in tables.items():
        assert table.sum(1).tolist() == [2] * 4
        assert all(1 <= n <= 3 for n in table.sum(0).tolist())
        for place, client in enumerate(trained.clients):
            sent = trained.request(client).payload.tensors()
            start = f"mixture.sites.{name.removeprefix('assigned.')}.experts."
            held = {int(n.removeprefix(start).split(".")[0]) for n in sent if n.startswith(start)}
            assert held == set(table[:, place].nonzero().flatten().tolist())
    assert not (tmp_path / "run" / "shared").exists()
    trained.model.close()
