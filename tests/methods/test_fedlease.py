"""FedLEASE: a whole run equals an independent loop; clusters by brute force; clients that come late."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.finished.trained import TrainedRun
from flexperts.methods.fedlease import FedLEASE, clusters, direction, most_clusters, silhouette
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import load_server

from .routed_loop import SGD, Loop, routed_model

OWN = ".experts.0."


def pairs_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if OWN in n}


def mean_of(tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: sum(each[n] for each in tensors) / len(tensors) for n in tensors[0]}  # type: ignore[misc]


# Clusters.


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """1 - cos of the flattened B, mean over layers."""
    names = [n for n in one if n.endswith(f"{OWN}B")]
    flat = [(one[n].flatten().double(), other[n].flatten().double()) for n in names]
    return sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in flat) / len(names)


def merged(d: np.ndarray, count: int) -> list[set[int]]:
    """Merge the two groups with the smallest mean distance until there are ``count``."""
    groups = [{i} for i in range(len(d))]
    while len(groups) > count:
        pairs = itertools.combinations(range(len(groups)), 2)
        x, y = min(pairs, key=lambda p: np.mean([d[i, j] for i in groups[p[0]] for j in groups[p[1]]]))
        groups[x] |= groups.pop(y)
    return groups


def goodness(d: np.ndarray, groups: list[set[int]]) -> float:
    scores = []
    for group in groups:
        for i in group:
            if len(group) == 1:
                scores.append(0.0)
                continue
            a = np.mean([d[i, j] for j in group if j != i])
            b = min(np.mean([d[i, j] for j in other]) for other in groups if other is not group)
            scores.append((b - a) / max(a, b))
    return float(np.mean(scores))


def by_brute_force(d: np.ndarray, most: int) -> list[int]:
    """Return every client's cluster, numbered by first member."""
    if len(d) < 3:
        return list(range(len(d)))
    divisions = [merged(d, count) for count in range(2, min(most, len(d) - 1) + 1)]
    best = sorted(max(divisions, key=lambda groups: goodness(d, groups)), key=min)
    return [next(number for number, group in enumerate(best) if i in group) for i in range(len(d))]


def some_distances(size: int, seed: int) -> np.ndarray:
    half = np.triu(np.random.default_rng(seed).uniform(0.1, 2, (size, size)), 1)
    return half + half.T


def test_a_plan_has_the_most_clusters_that_clients_can_get() -> None:
    drawn = np.random.default_rng(0)
    for clients in range(1, 7):
        found = set()
        for _ in range(200):
            one = drawn.random((clients, clients))
            found.add(1 + max(clusters(one + one.T, 4)))
        assert max(found) == most_clusters(clients, 4)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(2, 6), st.integers(0, 10**6))
def test_clusters_are_those_of_brute_force(size: int, most: int, seed: int) -> None:
    d = some_distances(size, seed)
    found = clusters(d, most)
    assert found == by_brute_force(d, most)
    assert sorted(set(found)) == list(range(max(found) + 1))
    assert max(found) < most
    order = np.random.default_rng(seed + 1).permutation(size)
    again = clusters(d[order][:, order], most)
    together = {(i, j): found[order[i]] == found[order[j]] for i in range(size) for j in range(size)}
    assert together == {(i, j): again[i] == again[j] for i in range(size) for j in range(size)}


@settings(max_examples=30)
@given(st.integers(3, 9), st.integers(0, 10**6))
def test_silhouettes_are_those_of_brute_force(size: int, seed: int) -> None:
    d = some_distances(size, seed)
    labels = np.concatenate([[0, 1], np.random.default_rng(seed).integers(0, 3, size - 2)])
    groups = [set(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())]
    assert silhouette(d, labels) == pytest.approx(goodness(d, groups))


def test_the_groups_that_are_there_are_found() -> None:
    """Three tight groups of different sizes; without a group structure the smallest number is taken."""
    groups = [0, 1, 0, 2, 1, 0, 2]
    d = np.array([[0.1 if a == b else 1.0 for b in groups] for a in groups])
    assert clusters(d, 4) == [0, 1, 0, 2, 1, 0, 2]
    assert len(set(clusters(d, 2))) == 2
    assert len(set(clusters(np.ones((5, 5)), 4))) == 2
    assert len(set(clusters(np.zeros((5, 5)), 4))) == 2


# A run.


@pytest.mark.parametrize("late", [(), ("shop",)], ids=["everyone", "one late"])
def test_a_run_is_an_independent_loop(
    recipe: Callable[..., RunConfig],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: tuple[str, ...],
) -> None:
    """Two rounds alone, then routed, with half of the clients; a late one trains alone once and gets a cluster."""
    chosen = FedLEASE.participants

    def participants(self: FedLEASE, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        if server.round == 2:
            return [*late, "clinic"] if late else chosen(self, server, sampled)
        return [name for name in chosen(self, server, sampled) if name not in late or server.round > 2]

    monkeypatch.setattr(FedLEASE, "participants", participants)
    options = "method.options={warmup_rounds=2, max_experts=3}"
    share = "federation.participation=" + ("1.0" if late else "0.5")
    config = recipe("method.name=fedlease", options, "federation.rounds=5", share, *SGD)
    run_federation(config, tmp_path / "run")
    loop = Loop(config, tiny_base, tmp_path / "run")
    assert [len(names) for names in loop.participants[:2]] == [4 - len(late)] * 2
    alone: dict[str, dict[str, Tensor]] = {}
    cluster: dict[str, int] = {}
    experts: list[dict[str, Tensor]] = []
    warm: dict[str, dict[str, Tensor]] = {}

    def routed(client: str) -> tuple[dict[str, Tensor], list[int], int]:
        """What a client computes with: tensors, slots and slots per token."""
        if client not in cluster:
            return {**loop.start, **alone.get(client, {})}, [0], 1
        own, count = cluster[client], len(experts)
        tensors = dict(experts[own])
        for place, number in enumerate((n for n in range(count) if n != own), 1):
            tensors |= {n.replace(OWN, f".experts.{place}."): t for n, t in pairs_of(experts[number]).items()}
        return tensors, [*range(count), *[0] * (count - 1)], count

    for number, names in enumerate(loop.participants, 1):
        sent, newcomers = {}, []
        for client in names:
            tensors, slots, best = routed(client)
            routers = client in cluster
            after = loop.train(
                client, number, tensors, lambda n, r=routers: OWN in n or (r and n.endswith(".router")), slots, best
            )
            if client in cluster:
                sent[client] = {n: t for n, t in after.items() if OWN in n or n.endswith(".router")}
            else:
                alone[client] = sent[client] = pairs_of(after)
                newcomers += [client] if number > 2 else []
        if number == 2:
            warm = dict(sent)
            d = np.array([[distance(warm[a], warm[b]) if a != b else 0.0 for b in names] for a in names])
            cluster |= dict(zip(names, by_brute_force(d, 3), strict=True))
            count = max(cluster.values()) + 1
            routers_start = {n: t[: 2 * count - 1] for n, t in loop.start.items() if n.endswith(".router")}
            experts = [routers_start | mean_of([warm[n] for n in names if cluster[n] == j]) for j in range(count)]
        elif number > 2:
            known = {client: own for client, own in cluster.items() if client in sent}
            for j in set(known.values()):
                experts[j] = mean_of([sent[client] for client, own in known.items() if own == j])
            for client in newcomers:
                far = [np.mean([distance(sent[client], warm[m]) for m in warm if cluster[m] == j])
                       for j in range(len(experts))]  # fmt: skip
                cluster[client] = int(np.argmin(far))
    server = load_server(tmp_path / "run" / "checkpoint.safetensors")
    assert {
        n.removeprefix("cluster."): int(t) for n, t in server.memory.items() if n.startswith("cluster.")
    } == cluster
    assert 2 <= len(experts) <= 3
    for j, expert in enumerate(experts):
        for name, tensor in expert.items():
            torch.testing.assert_close(server.memory[f"expert.{j}.{name}"], tensor, rtol=1e-3, atol=5e-6)
    moved = [
        (t - loop.start[n][: len(t)]).abs().max() for e in experts for n, t in e.items() if n.endswith("router")
    ]
    assert max(moved) > 1e-5
    trained, ids = TrainedRun(tmp_path / "run"), torch.arange(24).reshape(2, 12)
    for client in sorted(cluster):
        by_hand = routed_model(tiny_base, *routed(client))
        with (
            trained.client(client).in_state(trained.request(client), "personalized") as (model, _),
            torch.no_grad(),
        ):
            torch.testing.assert_close(
                model(input_ids=ids).logits, by_hand(input_ids=ids).logits, rtol=1e-3, atol=1e-4
            )
    assert not (tmp_path / "run" / "shared").exists()
    trained.close()


# The server.


def loras(**directions: Sequence[float]) -> dict[str, dict[str, Tensor]]:
    """Clients' LoRAs on one layer; B has the given direction."""
    site = "mixture.sites.q.experts.0."
    return {
        name: {f"{site}A": torch.full((1, 3), float(len(name))), f"{site}B": torch.tensor(B)[:, None]}
        for name, B in directions.items()
    }


def clustered(**options: Any) -> tuple[FedLEASE, Server]:
    """Two clusters, of a, b and of c, d; the routers start at 7."""
    method = FedLEASE(FedLEASE.Options(warmup_rounds=2, max_experts=3, **options))
    sent = loras(a=[1.0, 0.0], b=[2.0, 0.2], c=[0.0, 1.0], d=[0.1, 4.0])
    start = {n: torch.zeros_like(t) for n, t in sent["a"].items()} | {
        "mixture.sites.q.router": torch.full((5, 3), 7.0)
    }
    server = Server(Payload.of(start), dict.fromkeys("abcde", 4), round=1)
    for name in "abcde":
        assert method.broadcast(server, name).size == 0
        assert method.uplink(server, name) == Payload.of(sent["a"]).manifest
    method.aggregate(server, [Update(name, Payload.of(sent[name]), 4, {}) for name in "abcd"])
    server.round = 2
    return method, server


def test_before_its_last_round_the_warm_up_sends_nothing(take_turn: Any) -> None:
    method, server = FedLEASE(), Server(Payload.of(loras(a=[1.0])["a"]), {"a": 4, "b": 4}, round=3)
    assert method.uplink(server, "a").size == 0
    assert method.participants(server, ["b"]) == ["a", "b"]
    method.aggregate(server, [Update("a", Payload.empty(), 4, {})])
    assert server.memory == {}
    server.round = 5
    assert method.participants(server, ["b"]) == ["b"]
    with take_turn("method.name=fedlease", round=4, received={}) as (own, turn):
        own.receive(turn)
        own.train(turn)
        assert own.outgoing(turn) == {}
        assert turn.memory.keys() == pairs_of(dict(turn.split.shared)).keys()


def test_experts_are_means_of_clusters_and_every_client_has_its_own_first() -> None:
    method, server = clustered()
    assert [int(server.memory[f"cluster.{name}"]) for name in "abcd"] == [0, 0, 1, 1]
    site = "mixture.sites.q."
    for name, first, second in (("a", [1.5, 0.1], [0.05, 2.5]), ("d", [0.05, 2.5], [1.5, 0.1])):
        sent = method.broadcast(server, name).tensors()
        assert sent.keys() == {f"{site}router", *(f"{site}experts.{e}.{side}" for e in (0, 1) for side in "AB")}
        assert sent[f"{site}experts.0.B"].flatten().tolist() == pytest.approx(first)
        assert sent[f"{site}experts.1.B"].flatten().tolist() == pytest.approx(second)
        assert sent[f"{site}router"].tolist() == [[7.0] * 3] * 3  # 2M - 1 slots
        assert set(method.uplink(server, name).names) == {f"{site}router", *(f"{site}experts.0.{s}" for s in "AB")}
    assert method.broadcast(server, "e").size == 0


def test_a_cluster_is_averaged_over_the_members_that_took_part_whatever_their_rows() -> None:
    method, server = clustered()

    def reply(client: str, level: float, rows: int) -> Update:
        manifest = method.uplink(server, client)
        return Update(client, Payload(manifest, np.full(manifest.size, level, dtype=np.float32)), rows, {})

    method.aggregate(server, [reply("a", 1.0, 4), reply("b", 4.0, 900)])
    own, other = (method.broadcast(server, name).tensors() for name in "ac")
    assert {t.unique().item() for n, t in own.items() if ".experts.1." not in n} == {2.5}
    assert other["mixture.sites.q.experts.0.B"].flatten().tolist() == pytest.approx([0.05, 2.5])
    assert other["mixture.sites.q.router"].unique().item() == 7
    assert other["mixture.sites.q.experts.1.A"].unique().item() == 2.5


@pytest.mark.parametrize(("B", "cluster"), [([3.0, 1.0], 0), ([1.0, 3.0], 1), ([-3.0, -1.0], 1)])
def test_a_client_without_a_cluster_gets_the_nearest(B: list[float], cluster: int) -> None:
    """Nearest by the mean of 1 - cos over the members; its LoRA does not change the expert."""
    method, server = clustered()
    before = method.broadcast(server, "a")
    method.aggregate(server, [Update("e", Payload.of(loras(e=B)["e"]), 4, {})])
    assert int(server.memory["cluster.e"]) == cluster
    assert np.array_equal(method.broadcast(server, "a").vector, before.vector)
    members = loras(a=[1.0, 0.0], b=[2.0, 0.2], c=[0.0, 1.0], d=[0.1, 4.0])
    far = [np.mean([distance(loras(e=B)["e"], members[m]) for m in names]) for names in ("ab", "cd")]
    assert int(np.argmin(far)) == cluster
    near = [direction(loras(e=B)["e"]) @ server.memory[f"centre.{j}"] for j in (0, 1)]
    assert [1 - float(n) for n in near] == pytest.approx(far, abs=1e-6)
    server.clients = dict.fromkeys("abcd", 4)
    method.regroup(server)
    assert {n for n in server.memory if n.startswith("cluster.")} == {f"cluster.{name}" for name in "abcd"}


def test_a_client_trains_its_own_expert_and_the_router_only(take_turn: Any) -> None:
    options = "method.options={warmup_rounds=1, max_experts=4}"
    with take_turn("method.name=fedlease", options, round=2) as (method, turn):
        assert not turn.split.personal
        frozen = {n: p for n, p in turn.split.frozen.items() if n.startswith("mixture.")}
        received = {n: t for n, t in turn.received.items() if OWN in n}
        received |= {n: t[:5] for n, t in turn.received.items() if n.endswith(".router")}  # three experts
        received |= {n: torch.full(p.shape, 0.1) for n, p in frozen.items() if ".experts.3." not in n}
        turn.received = received
        turn.memory["old"] = torch.ones(1)
        method.receive(turn)
        assert (turn.parts["mixture"].slots, turn.parts["mixture"].best) == ((0, 1, 2, 0, 0), 3)
        method.train(turn)
        sent = method.outgoing(turn)
        assert sent.keys() == {n for n in received if OWN in n or n.endswith(".router")}
        assert all(t.shape == received[n].shape and not torch.equal(t, received[n]) for n, t in sent.items())
        assert all(torch.equal(p, received.get(n, p)) for n, p in frozen.items())
        assert turn.memory == {}


def test_a_recipe_that_ends_with_the_warm_up_is_refused(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"warmup_rounds = 5 with federation\.rounds = 3: .*set federation\.rounds"
    ):
        run_federation(recipe("method.name=fedlease", "federation.rounds=3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    FedLEASE().check(recipe("method.name=fedlease", "federation.rounds=6"))
