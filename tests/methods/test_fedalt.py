"""FedALT: a whole run equals an independent loop; means leave the receiver out; the router stays at home."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexperts.communication.messages import Update, encode
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import FederationError, PrivacyError
from flexperts.finished.trained import TrainedRun
from flexperts.methods.fedalt import FedALT
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.store import load_personal
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import load_server

from .routed_loop import SGD, Loop, routed_model

REST, OWN = ".experts.0.", ".experts.1."


def own_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if OWN in n}


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_a_run_is_an_independent_loop(
    recipe: Callable[..., RunConfig], tiny_base: Path, tmp_path: Path, participation: float
) -> None:
    """Also where clients miss rounds: they count with what they sent last, and keep their own pair."""
    more = ("federation.rounds=4", f"federation.participation={participation}", "training.personal_lr=12.0")
    config = recipe("method.name=fedalt", *SGD, *more)
    run_federation(config, tmp_path / "run")
    loop = Loop(config, tiny_base, tmp_path / "run")
    clients: dict[str, dict[str, Tensor]] = {}
    last: dict[str, dict[str, Tensor]] = {}

    def rest_of(client: str) -> dict[str, Tensor]:
        others = [pair for name, pair in last.items() if name != client] or [own_of(loop.start)]
        return {n.replace(OWN, REST): sum(pair[n] for pair in others) / len(others) for n in others[0]}

    for number, participants in enumerate(loop.participants, 1):
        sent = {}
        for client in participants:
            tensors = {**loop.start, **clients.get(client, {}), **rest_of(client)}
            clients[client] = loop.train(
                client,
                number,
                tensors,
                lambda name: REST not in name,
                [0, 1],
                2,
                lambda name: 3.0 if name.endswith("router") else 1.0,
            )
            sent[client] = own_of(clients[client])
        last |= sent
    if participation < 1:
        missed = [set(last) - set(names) for names in loop.participants[1:]]
        assert any(missed)
    trained = TrainedRun(tmp_path / "run")
    for client, tensors in clients.items():
        stored, _ = load_personal(tmp_path / "run" / "personal" / f"{client}.safetensors")
        assert {n.removeprefix("memory.") for n in stored} == {n for n in tensors if REST not in n}
        for kind in (".A", ".B", ".router"):
            assert max((t - loop.start[n]).abs().max() for n, t in tensors.items() if n.endswith(kind)) > 1e-3
        for name, tensor in stored.items():
            name = name.removeprefix("memory.")
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=2e-6)
        received = trained.request(client).payload.tensors()
        for name, tensor in rest_of(client).items():
            torch.testing.assert_close(received[name], tensor, rtol=1e-4, atol=2e-6)
        with (
            trained.client(client).in_state(trained.request(client), "personalized") as (model, _),
            torch.no_grad(),
        ):
            ids = torch.arange(24).reshape(2, 12)
            by_hand = routed_model(tiny_base, {**tensors, **rest_of(client)}, [0, 1], 2)
            torch.testing.assert_close(
                model(input_ids=ids).logits, by_hand(input_ids=ids).logits, rtol=1e-3, atol=1e-4
            )
    trained.close()
    assert {
        n for n in load_server(tmp_path / "run" / "checkpoint.safetensors").memory if n.startswith("last.")
    } == {f"last.{client}" for client in clients}


def server_of(*clients: str) -> tuple[FedALT, Server]:
    start = {
        "mixture.sites.q.experts.1.A": torch.full((1, 2), 5.0),
        "mixture.sites.q.experts.1.B": torch.zeros(2, 1),
    }
    return FedALT(), Server(Payload.of(start), dict.fromkeys(clients, 4))


def reply(server: Server, client: str, level: float, rows: int = 4) -> Update:
    tensors = {n: torch.full(t.shape, level) for n, t in server.shared.tensors().items()}
    return Update(client, Payload.of(tensors), rows, {})


def levels(method: FedALT, server: Server, client: str) -> list[float]:
    """What a client is sent: the values of A, then of B."""
    sent = method.broadcast(server, client).tensors()
    assert [*sent] == ["mixture.sites.q.experts.0.A", "mixture.sites.q.experts.0.B"]
    return [t.unique().item() for t in sent.values()]


def test_every_other_client_counts_once_with_what_it_sent_last() -> None:
    method, server = server_of("a", "b", "c", "d")
    assert levels(method, server, "a") == [5, 0]
    method.aggregate(server, [reply(server, "b", 2.0, rows=900)])
    assert levels(method, server, "b") == [5, 0]  # no other has sent a pair
    assert levels(method, server, "a") == levels(method, server, "d") == [2, 2]
    method.aggregate(server, [reply(server, "a", 1.0), reply(server, "c", 6.0)])
    assert [levels(method, server, name)[0] for name in "abcd"] == [4, 3.5, 1.5, 3]
    method.aggregate(server, [reply(server, "a", 7.0)])
    assert [levels(method, server, name)[0] for name in "abcd"] == [4, 6.5, 4.5, 5]
    server.clients = {"a": 4, "c": 4, "d": 4, "e": 4}
    method.regroup(server)
    assert [levels(method, server, name)[0] for name in "acde"] == [6, 7, 6.5, 6.5]
    assert not [n for n in server.memory if n.endswith(".b")]


def test_a_round_broadcasts_what_was_there_before_it() -> None:
    """A grid of one process asks for the second client's broadcast after the first one's reply."""
    method, server = server_of("a", "b")
    seen = []

    def lazily() -> Any:
        for name, level in (("a", 1.0), ("b", 2.0)):
            seen.append(levels(method, server, name))
            yield reply(server, name, level)

    method.aggregate(server, lazily())
    assert seen == [[5, 0], [5, 0]]
    with pytest.raises(FederationError, match="no update arrived"):
        method.aggregate(server, [])


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-1e3, 1e3, width=32), min_size=1),
    st.sampled_from("abcdefgh"),
)
def test_the_mean_is_that_of_the_others(sent: dict[str, float], client: str) -> None:
    method, server = server_of(*"abcdefgh")
    method.aggregate(server, [reply(server, name, sent[name]) for name in sorted(sent)])
    others = [level for name, level in sent.items() if name != client]
    expected = sum(others) / len(others) if others else 5.0
    assert levels(method, server, client)[0] == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_the_router_cannot_be_encoded(take_turn: Any) -> None:
    """Neither under its name, nor as a derived value, nor as a view."""
    with take_turn("method.name=fedalt") as (method, turn):
        routers = turn.split.personal
        assert all(name.endswith(".router") for name in routers)
        assert routers.keys() == {n.rpartition(".experts")[0] + ".router" for n in turn.split.shared}
        assert method.outgoing(turn).keys() == turn.split.shared.keys()
        name, router = next(iter(routers.items()))
        own = next(iter(turn.split.shared))
        for sent in ({name: router}, {"derived.router": router}, {own: router.detach()[:1]}):
            with pytest.raises(PrivacyError):
                encode(turn.split, sent)
        rest = next(n for n in turn.split.frozen if REST in n)
        with pytest.raises(PrivacyError):
            encode(turn.split, {rest: turn.split.frozen[rest]})


def test_received_pairs_are_frozen_and_the_own_pair_is_never_overwritten(take_turn: Any) -> None:
    with take_turn("method.name=fedalt", round=1) as (method, turn):
        rest = {n: torch.full(p.shape, 0.1) for n, p in turn.split.frozen.items() if REST in n}
        turn.received = rest
        method.receive(turn)
        method.train(turn)
        own = {n: p.detach().clone() for n, p in turn.split.shared.items()}
        assert all(torch.equal(turn.split.frozen[n], t) for n, t in rest.items())
        with torch.no_grad():
            for parameter in turn.split.shared.values():
                parameter.zero_()
        turn.received = {n: t * 2 for n, t in rest.items()}
        method.receive(turn)
        assert all(torch.equal(p, own[n]) for n, p in turn.split.shared.items())
        assert all(torch.equal(turn.split.frozen[n], t * 2) for n, t in rest.items())
        turn.received = dict(list(rest.items())[1:])
        with pytest.raises(FederationError, match="names and shapes must be those of the model"):
            method.receive(turn)
