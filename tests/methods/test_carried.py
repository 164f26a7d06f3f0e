"""Residuals beside the base: exact in every case, bounded, the same bits on every client, whatever it missed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.engines.run import run_federation
from flexperts.errors import FederationError
from flexperts.methods.flex import Flex
from flexperts.methods.kit.carried import ExactMean, bounded, residual
from flexperts.methods.kit.ranks import Factors
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import register_method
from flexperts.parameters.vector import Payload

SIZES = st.integers(1, 9)


@given(rank=st.integers(0, 20), width=SIZES, height=SIZES, seed=st.integers(0, 99))
def test_bounded_factors_have_the_same_product(rank: int, width: int, height: int, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, width, generator=stream), torch.randn(height, rank, generator=stream)
    new_A, new_B = bounded(A, B)
    assert len(new_A) == new_B.shape[1] == min(rank, width, height)
    assert new_A.dtype == new_B.dtype == torch.float32
    exact = B.double() @ A.double()
    torch.testing.assert_close(new_B.double() @ new_A.double(), exact, rtol=1e-6, atol=1e-6)


@given(
    ranks=st.integers(1, 4),
    width=SIZES,
    height=SIZES,
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_the_residual_is_what_the_means_lack(
    ranks: int, width: int, height: int, rows: list[int], seed: int
) -> None:
    stream = torch.Generator().manual_seed(seed)
    pairs = [
        (torch.randn(ranks, width, generator=stream), torch.randn(height, ranks, generator=stream)) for _ in rows
    ]
    weights = [n / sum(rows) for n in rows]
    mean = tuple(sum(p * each[side] for p, each in zip(weights, pairs, strict=True)) for side in (0, 1))
    sent: list[tuple[float, Factors]] = [(p, {"x": pair}) for p, pair in zip(weights, pairs, strict=True)]
    A, B = residual(sent, {"x": mean})["x"]  # type: ignore[dict-item]
    assert len(A) == min(ranks * (len(rows) - 1), width, height)
    products = sum(p * (B.double() @ A.double()) for p, (A, B) in zip(weights, pairs, strict=True))
    lacking = products - mean[1].double() @ mean[0].double()  # type: ignore[union-attr]
    torch.testing.assert_close(B.double() @ A.double(), lacking, rtol=0, atol=2e-5)


def test_equal_clients_leave_nothing() -> None:
    pair = torch.randn(2, 5), torch.randn(4, 2)
    A, B = residual([(0.3, {"x": pair}), (0.7, {"x": pair})], {"x": pair})["x"]
    assert not (B @ A).count_nonzero()


def trained(server: Server, number: int, clients: str) -> list[Update]:
    stream = torch.Generator().manual_seed(number)
    return [
        Update(c, Payload.of({n: torch.randn(t.shape, generator=stream) for n, t in tensors.items()}), 3, {})
        for c in clients
        for tensors in [server.shared.tensors()]
    ]


def sums(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in memory.items() if n.startswith("residual.sum.")}


def size(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def taken(method: Any, turn: Any, server: Server, client: str, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let a client receive the next round's broadcast; return its new memory."""
    payload = method.broadcast(server, client)
    its = replace(turn, round=server.round + 1, received=payload.tensors(), memory=dict(memory))
    method.receive(its)
    return its.memory


def test_whatever_a_client_missed_it_has_the_servers_bits(take_turn: Any) -> None:
    """a takes part in every round, b in some, c comes late; the sum outgrows the layers' sizes on the way."""
    with take_turn("method.name=fedex_lora", "lora.rank=4") as (method, turn):
        server = Server(Payload.of(turn.split.shared), dict.fromkeys("abc", 3))
        memories: dict[str, dict[str, Tensor]] = {c: {} for c in "abc"}
        single, ranks = [], set()
        for number, who in enumerate(("ab", "a", "ab", "a", "a", "ab", "a", "a", "ab", "ac", "abc", "bc")):
            for client in who:
                most = server.shared.size + size(sums(server.memory))
                assert method.broadcast(server, client).size <= most
                memories[client] = taken(method, turn, server, client, memories[client])
                ours, theirs = sums(memories[client]), sums(server.memory)
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
                if server.round:
                    layers = turn.parts["residual"].layers
                    loaded = torch.cat([layer.A.flatten() for layer in layers.values()])
                    assert loaded.numel() == size({n: t for n, t in ours.items() if "lora_A" in n})
            method.aggregate(server, trained(server, number, who))
            server.round += 1
            single.append(size(server.memory) - size(sums(server.memory)) - len(server.clients))
            ranks |= {t.shape[0] for n, t in sums(server.memory).items() if "lora_A" in n}
        whole = size(sums(server.memory))
        assert max(single) <= whole
        assert max(ranks) == 32  # of a layer from 32 to 32; of one from 32 to 16, 16
        assert {t.shape[0] for n, t in sums(server.memory).items() if "v_proj.lora_A" in n} == {16}


def test_a_lost_reply_adds_nothing_twice(take_turn: Any) -> None:
    with take_turn("method.name=fedex_lora", "lora.rank=4") as (method, turn):
        server = Server(Payload.of(turn.split.shared), dict.fromkeys("ab", 3))
        memory = taken(method, turn, server, "a", {})
        method.aggregate(server, trained(server, 0, "ab"))
        server.round = 1
        memory = taken(method, turn, server, "a", memory)
        server.round, server.memory["received.a"] = 1, torch.tensor(0)  # its reply did not arrive
        again = taken(method, turn, server, "a", memory)
        assert all(torch.equal(t, sums(server.memory)[n]) for n, t in sums(again).items())


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_a_client_whose_state_is_too_old_is_told_what_to_do(take_turn: Any, name: str) -> None:
    with take_turn(f"method.name={name}", "lora.rank=4") as (method, turn):
        server = Server(Payload.of(turn.split.shared), dict.fromkeys("ab", 3))
        for number in range(3):
            method.aggregate(server, trained(server, number, "ab"))
            server.round += 1
        with pytest.raises(FederationError, match=r"clinic: .* lacks what .* after round 1: .*forget"):
            taken(method, turn, server, "a", {})


def test_a_single_evaluation_takes_the_sum(take_turn: Any) -> None:
    with take_turn("method.name=fedex_lora", "lora.rank=4") as (method, turn):
        server = Server(Payload.of(turn.split.shared), dict.fromkeys("ab", 3))
        for number in range(2):
            method.aggregate(server, trained(server, number, "ab"))
            server.round += 1
        final = method.final(server, "b")
        assert size(final.tensors()) == server.shared.size + size(sums(server.memory))
        its = replace(turn, round=2, received=final.tensors(), memory={})
        method.receive(its)
        assert all(torch.equal(t, sums(server.memory)[n]) for n, t in sums(its.memory).items())
        assert all(torch.equal(p, server.shared.tensors()[n]) for n, p in its.split.shared.items())


@pytest.mark.usefixtures("own_registry")
def test_another_method_gets_it_in_one_line(recipe: Any, tmp_path: Path) -> None:
    class ExactFlex(ExactMean, Flex):
        """FLEx with an exact mean."""

        name = "exact_flex"

    register_method("exact_flex", ExactFlex)
    settings = ("training.lr=0.05", "evaluation.max_new_tokens=1")
    ours, theirs = (
        run_federation(recipe(f"method.name={name}", *settings), tmp_path / name) for name in ("exact_flex", "flex")
    )
    for state in ("global", "personalized"):
        assert np.isfinite(ours["mean"]["nll"][state])
        assert ours["mean"]["nll"][state] != theirs["mean"]["nll"][state]
    assert ours["mean"]["nll"]["zero_shot"] == theirs["mean"]["nll"]["zero_shot"]
    assert ours["bytes"]["personal_sent"] == 0
