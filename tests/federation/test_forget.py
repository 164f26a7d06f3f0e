"""What the server keeps of a silo is taken out of a stopped run: name, report, and what it holds for it alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexperts.artifacts import RunDirectory
from flexperts.cli.main import app
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.errors import ArtifactError, FederationError, FlexpertsError
from flexperts.methods.fedalt import FedALT
from flexperts.methods.fedamole import FedAMoLE
from flexperts.methods.fedex_lora import FedExLoRA
from flexperts.methods.fedlease import FedLEASE
from flexperts.methods.fedmoe_da import FedMoEDA, _mix_experts, mixing
from flexperts.methods.flora import FLoRA
from flexperts.methods.hetlora import HetLoRA
from flexperts.methods.kit.server_state import Server
from flexperts.methods.scaffold import Scaffold
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import load_server, save_server
from flexperts.server.enrolment import change_clients
from flexperts.server.forget_client import forget_client

from .scripted_grid import (
    FOUR,
    SHARING,
    START,
    ScriptedGrid,
    Silo,
    Watch,
    bits,
    expected,
    losses,
    run_on,
    stopped,
    trio,
)

Recipe = Callable[..., RunConfig]


def test_a_forgotten_silo_is_not_mentioned_any_more(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    config, out = recipe(*FOUR), tmp_path / "run"
    stopped(config, out, a, b, c)
    result = CliRunner().invoke(app, ["forget", str(out), "b"])
    assert result.exit_code == 0, result.output
    assert "b is removed" in result.output
    server, rounds = run_on(ScriptedGrid(a, c), config, out)
    assert '"b"' not in json.dumps(rounds[2:])
    assert server.clients == {"a": 3, "c": 7}
    assert server.reports.keys() == {"a", "c"}
    assert bits(server) == expected([(a, b, c)] * 2 + [(a, c)] * 2).tobytes()


def test_a_run_that_waited_for_all_does_not_wait_for_the_forgotten(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    config, out = recipe(*FOUR, "federation.min_clients=3", "federation.deadline=0.5"), tmp_path / "run"
    stopped(config, out, a, b, c)
    with pytest.raises(FederationError, match=r"2 clients have joined \(a, c\): federation.min_clients = 3"):
        run_on(ScriptedGrid(a, c), config, out)
    forget_client(RunDirectory(out), "b")
    server, rounds = run_on(ScriptedGrid(a, c), config, out)
    assert (server.round, sorted(rounds[-1]["clients"])) == (4, ["a", "c"])


def test_what_cannot_be_forgotten(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    config, out = recipe(*FOUR), tmp_path / "run"
    stopped(config, out, a, b)
    path, run = out / "checkpoint.safetensors", RunDirectory(out)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="client 'c': the run's clients are a, b"):
        forget_client(run, "c")
    assert path.read_bytes() == before
    forget_client(run, "a")
    with pytest.raises(ArtifactError, match="client 'b': the run has no other client"):
        forget_client(run, "b")
    run_on(ScriptedGrid(b, c), config, out)
    with pytest.raises(ArtifactError, match="the run has finished"):
        forget_client(run, "b")
    with pytest.raises(ArtifactError):
        forget_client(RunDirectory(tmp_path), "b")


def test_a_silo_on_which_the_method_has_settled_stays(recipe: Recipe, tmp_path: Path) -> None:
    """With a the common expert is 0, without it 1; without c it stays 0."""
    silos = (
        Silo("a", 3, report=losses(0, 9)),
        Silo("b", 5, report=losses(3, 1)),
        Silo("c", 7, report=losses(4, 2)),
    )
    stopped(recipe(*SHARING), tmp_path / "run", *silos)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(FederationError, match="it is fixed before round 1; wait until"):
        forget_client(run, "a")
    forget_client(run, "c")
    assert sorted(load_server(run.checkpoint).clients) == ["a", "b"]


def test_a_silo_with_a_rank_may_come_late_and_be_forgotten(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    config = recipe(*FOUR, "method.name=flexlora", "method.options={ranks={b=1}}")
    out, watch = tmp_path / "run", Watch()
    grid = ScriptedGrid(a, c)
    watch.after["round_1"] = lambda: grid.enter(b)
    watch.after["round_3"] = lambda: grid.leave("b")
    run_on(grid, config, out, watch)
    assert watch.notices == ["method.options names b, which has not joined"]
    assert {number: vector.size for number, vector in b.received.items()} == {
        2: START.size // 2,
        3: START.size // 2,
    }
    stopped(config, tmp_path / "stopped", a, b, c)
    forget_client(RunDirectory(tmp_path / "stopped"), "b")
    server, _ = run_on(ScriptedGrid(a, c), config, tmp_path / "stopped")
    assert sorted(server.clients) == ["a", "c"]


def without(method: Any, server: Server, client: str) -> None:
    clients = {n: r for n, r in server.clients.items() if n != client}
    change_clients(method, server, clients, dict.fromkeys(clients), "")


def state(shared: Payload = START, round: int = 1, **memory: Any) -> Server:
    names = "abcd"
    kept = {n.replace("__", "."): torch.as_tensor(t) for n, t in memory.items()}
    return Server(shared, dict.fromkeys(names, 4), dict.fromkeys(names), round=round, memory=kept)


def test_control_variates_of_the_departed_are_forgotten(recipe: Recipe, tmp_path: Path) -> None:
    """c = (6 * 1 + 2 * 4) / 12: of the others' rows, a has no more than ``federation.max_share``."""
    config = recipe("method.name=scaffold", "training.optimizer=sgd", "federation.max_share=0.5")
    run = RunDirectory.create_or_resume(tmp_path / "run", config.to_toml())
    rows = {"a": 50, "b": 2, "c": 4, "d": 9}
    server = Server(Payload.of({"x": torch.zeros(1)}), rows, dict.fromkeys(rows), round=1)
    Scaffold().start(server)
    server.memory |= {f"last.{name}": torch.tensor([value]) for name, value in (("a", 1.0), ("b", 4.0), ("d", 7.0))}
    save_server(run.checkpoint, server)
    forget_client(run, "d")
    memory = load_server(run.checkpoint).memory
    assert sorted(memory) == ["last.a", "last.b", "x"]
    assert memory["x"].item() == pytest.approx(14 / 12)


def test_ranks_and_stacks_of_the_departed_are_forgotten() -> None:
    ranked = state(rank__a=2, rank__b=1)
    without(HetLoRA(), ranked, "b")
    assert ranked.memory.keys() == {"rank.a"}
    stacked = state(received__a=1, received__b=1, **{"stack__1__x": torch.ones(1)})
    without(FLoRA(), stacked, "b")
    assert stacked.memory.keys() == {"received.a", "stack.1.x"}
    carried = state(received__a=1, received__b=1, residual__sum__x=torch.ones(1))
    without(FedExLoRA(), carried, "b")
    assert carried.memory.keys() == {"received.a", "residual.sum.x"}


def test_a_silo_that_was_forgotten_and_comes_back_gets_all_residuals() -> None:
    method, server = FedExLoRA(), state(round=0)
    changed = [torch.full((START.size,), value) for value in (0.1, 0.4)]
    for _ in range(2):
        sent = [Update(c, replace(START, vector=v.numpy()), 4, {}) for c, v in zip("ab", changed, strict=True)]
        method.aggregate(server, sent)
        server.round += 1
    without(method, server, "b")
    change_clients(method, server, dict.fromkeys("abcd", 4), dict.fromkeys("abcd"), "")
    whole = method.broadcast(server, "b").tensors()  # two rounds are larger than the sum, whose rank is at most 3
    assert {n.split(".")[2] for n in whole if n.startswith("derived.")} == {"sum"}
    assert {n.split(".")[2] for n in method.broadcast(server, "a").tensors() if n.startswith("derived.")} == {"2"}


def fedmoe_da() -> tuple[FedMoEDA, Server]:
    """Two experts whose router rows differ from client to client; all have taken part in round 1."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared = Payload.of(
        {"experts.l.0.A": drawn(1, 2), "experts.l.1.A": drawn(1, 2), "router.layers.l": drawn(2, 3)}
    )
    method, server = FedMoEDA(), state(shared)
    for client in "abc":
        server.memory[f"own.{client}.derived.router_rows.l"] = drawn(2, 3)
        for name, tensor in shared.tensors().items():
            server.memory[f"own.{client}.{name}"] = tensor + drawn(*tensor.shape)
    return method, server


def test_experts_are_mixed_without_the_departed() -> None:
    method, server = fedmoe_da()
    method._compute_mix(server)
    assert server.memory["mix.l"].shape == (6, 6)
    kept = {n: t.clone() for n, t in server.memory.items() if n.startswith("own.") and ".b." not in n}
    without(method, server, "b")
    assert not [n for n in server.memory if n.startswith("own.b.")]
    rows = torch.cat([server.memory[f"own.{c}.derived.router_rows.l"] for c in "ac"])
    assert torch.equal(server.memory["mix.l"], mixing(rows, method.options.peers, method.options.tau))
    assert all(torch.equal(server.memory[n], t) for n, t in kept.items())
    _mix_experts(server, ["a", "c"])  # in rounds that do not compute A


def test_nothing_is_mixed_when_all_known_clients_have_left() -> None:
    """The others mix again when they send router rows."""
    method, server = fedmoe_da()
    method._compute_mix(server)
    for client in "abc":
        without(method, server, client)
    assert server.memory == {}
    server.round = 2  # A is not computed in round 3
    sent = method.broadcast(server, "d")
    assert method.uplink(server, "d") == sent.manifest
    method.aggregate(server, [Update("d", sent, 4, {})])
    assert torch.equal(server.memory["own.d.experts.l.0.A"], sent.tensors()["experts.l.0.A"])
    assert not [name for name in server.memory if name.startswith("mix.")]


@pytest.mark.parametrize("round", [0, 2])
def test_experts_are_assigned_to_the_clients_that_there_are(round: int) -> None:
    site = "mixture.sites.l"
    tensors = {f"{site}.experts.{e}.A": torch.full((2, 3), float(e)) for e in range(6)}
    shared = Payload.of(tensors | {f"{site}.projection": torch.ones(2, 3)})
    method = FedAMoLE(FedAMoLE.Options(experts=6, clients_per_expert=2, min_experts=2, max_experts=6))
    server = state(shared, round=round)
    method.start(server)
    for client in "abcd":
        server.memory[f"derived.tokens.l.{client}"] = torch.ones(2)
    server.memory["derived.expert.l.0"] = torch.ones(2)
    without(method, server, "b")
    assert server.memory["assigned.l"].shape == (6, 3)
    assert server.memory["assigned.l"].sum(1).tolist() == [2] * 6
    assert "derived.tokens.l.b" not in server.memory
    assert "derived.tokens.l.a" in server.memory
    if round:  # what experts have learned to stand for is kept
        assert server.memory["derived.expert.l.0"].tolist() == [1, 1]
    grown = {**server.clients, "e": 9}
    change_clients(method, server, grown, dict.fromkeys(grown), "")
    assert server.memory["assigned.l"].shape == (6, 4)
    assert method.broadcast(server, "e").size
    many = {f"n{i}": 1 for i in range(9)}
    with pytest.raises(FlexpertsError, match="holders over 9 clients"):
        change_clients(method, server, many, dict.fromkeys(many), "")
    assert sorted(server.clients) == ["a", "c", "d", "e"]


def test_pairs_and_clusters_of_the_departed_are_forgotten() -> None:
    pair = Payload.of({"mixture.sites.l.experts.1.A": torch.ones(1, 2)})
    alt = state(pair)
    for client, level in zip("abc", (1.0, 2.0, 6.0), strict=True):
        alt.memory[f"last.{client}"] = torch.full((2,), level)
    without(FedALT(), alt, "b")
    assert [n for n in alt.memory if n.startswith("last.")] == ["last.a", "last.c"]
    assert FedALT().broadcast(alt, "d").vector.tolist() == [3.5, 3.5]
    assert FedALT().broadcast(alt, "a").vector.tolist() == [6, 6]
    lease = state(cluster__a=0, cluster__b=1, centre__0=torch.ones(1), centre__1=torch.ones(1))
    lease.memory |= {f"expert.{j}.x": torch.full((1,), float(j)) for j in range(2)}
    without(FedLEASE(), lease, "b")
    assert lease.memory.keys() == {"cluster.a", "centre.0", "centre.1", "expert.0.x", "expert.1.x"}
    assert FedLEASE().broadcast(lease, "b").size == 0
