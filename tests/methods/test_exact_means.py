"""FedEx-LoRA, FedSVD and RoLoRA: whole runs against plain loops on dense weights, server rules by numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.methods.fedex_lora import FedExLoRA
from flexperts.methods.fedsvd import FedSVD
from flexperts.methods.kit.server_state import Server
from flexperts.methods.rolora import RoLoRA
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import load_server

from .by_hand import PLAIN, ROUNDS, SCALE, Plain, compare, leaf, lora_layers

Recipe = Callable[..., RunConfig]
Pairs = Mapping[str, tuple[Tensor, Tensor]]
ROWS = {"a": 5, "b": 1, "c": 3}
LAYERS = {"q": (7, 9), "v": (5, 9)}  # out, in


def state_after(config: RunConfig, out: Path) -> Server:
    run_federation(config, out)
    return load_server(RunDirectory.open(out).checkpoint)


def compare_factors(found: Pairs, expected: Pairs, plain: Plain) -> None:
    first = lora_layers(plain.start)
    assert found.keys() == expected.keys()
    for side in (0, 1):
        compare((pair[side], expected[m][side], first[m][side]) for m, pair in found.items())


def mean(tensors: list[Tensor]) -> Tensor:
    """The silos of the runs have equally many rows."""
    return torch.stack([t.detach() for t in tensors]).mean(0)


def drawn(rank: int, seed: int) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    made = {}
    for layer, (out, into) in LAYERS.items():
        made[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, into, generator=stream)
        made[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(out, rank, generator=stream)
    return made


def only(tensors: Mapping[str, Tensor], factor: str) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if f".lora_{factor}." in n}


def updates(sent: Mapping[str, Mapping[str, Tensor]]) -> list[Update]:
    return [Update(c, Payload.of(t), ROWS[c], {}) for c, t in sent.items()]


def products(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return B A by layer, in float64."""
    return {layer: (B.double() @ A.double()).numpy() for layer, (A, B) in lora_layers(tensors).items()}


def mean_product(sent: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return sum_i p_i B_i A_i by layer."""
    total = sum(ROWS[c] for c in sent)
    each = {c: products(t) for c, t in sent.items()}
    return {layer: sum(ROWS[c] / total * each[c][layer] for c in sent) for layer in LAYERS}


def close_products(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for layer in LAYERS:
        np.testing.assert_allclose(found[layer], expected[layer], rtol=0, atol=2e-6)


# FedEx-LoRA.


def test_fedex_is_a_loop_that_adds_the_residual_to_dense_weights(
    recipe: Recipe, byte_base: Path, tmp_path: Path
) -> None:
    config = recipe(f"model.base={byte_base}", "method.name=fedex_lora", *PLAIN)
    plain = Plain(config)
    pairs: Pairs = lora_layers(plain.start)
    dense = {m: torch.zeros(len(B), A.shape[1]) for m, (A, B) in pairs.items()}
    for number in range(1, ROUNDS + 1):
        sent = []
        for client in plain.clients:
            mine = {m: (leaf(A), leaf(B)) for m, (A, B) in pairs.items()}
            plain.train(
                [t for pair in mine.values() for t in pair],
                client,
                number,
                lambda mine=mine: {m: dense[m] + SCALE * B @ A for m, (A, B) in mine.items()},
            )
            sent.append(mine)
        new = {m: (mean([s[m][0] for s in sent]), mean([s[m][1] for s in sent])) for m in pairs}
        for m, (A, B) in new.items():
            dense[m] += SCALE * (mean([s[m][1] @ s[m][0] for s in sent]) - B @ A)
        pairs = new

    server = state_after(config, tmp_path / "run")
    compare_factors(lora_layers(server.shared.tensors()), pairs, plain)
    carried = lora_layers({n.removeprefix("residual.sum."): t for n, t in server.memory.items() if ".sum." in n})
    compare(((SCALE * B @ A, dense[m], torch.zeros(())) for m, (A, B) in carried.items()), least=1e-4)
    assert carried.keys() == dense.keys()


def test_fedex_has_the_mean_of_the_products_after_any_rounds() -> None:
    """Beside the adapter, the base has all that the means of the products had and the products of means lacked."""
    method, start = FedExLoRA(), drawn(3, 0)
    server = Server(Payload.of(start), ROWS)
    method.start(server)
    carried: dict[str, Any] = dict.fromkeys(LAYERS, 0.0)
    for number, who in enumerate(("abc", "ac", "b", "abc", "bc")):
        sent = {c: drawn(3, 10 * number + i) for i, c in enumerate(who, 1)}
        method.aggregate(server, updates(sent))
        server.round += 1
        lacking = products(server.shared.tensors())
        carried = {la: carried[la] + mean_product(sent)[la] - lacking[la] for la in LAYERS}
        close_products(products(method.adapter(server)), {la: carried[la] + lacking[la] for la in LAYERS})
        if who == "b":
            assert not any(t.shape[0] for n, t in server.memory.items() if ".3." in n and "lora_A" in n)
        shapes = {n: t.shape for n, t in server.memory.items() if n.startswith("residual.sum.")}
        for layer, (out, into) in LAYERS.items():
            assert shapes[f"residual.sum.base_model.model.{layer}.lora_A.weight"][0] <= min(out, into)
    assert server.memory["received.b"] == 4


def test_fedex_averages_factors_as_fedavg_does() -> None:
    from flexperts.methods.fedavg import FedAvg

    ours, theirs = (Server(Payload.of(drawn(3, 0)), ROWS) for _ in "ab")
    sent = {c: drawn(3, i) for i, c in enumerate("abc", 1)}
    FedExLoRA().aggregate(ours, updates(sent))
    FedAvg().aggregate(theirs, updates(sent))
    assert np.array_equal(ours.shared.vector, theirs.shared.vector)


def test_fedex_adapter_folder_computes_the_global_state(recipe: Recipe, tmp_path: Path, tiny_base: Path) -> None:
    run_federation(recipe("method.name=fedex_lora", *PLAIN), tmp_path / "run")
    trained, ids = TrainedRun(tmp_path / "run"), torch.arange(40).reshape(2, 20)
    with trained.client("shop").in_state(trained.request("shop"), "global") as (model, _), torch.no_grad():
        ours = model(input_ids=ids).logits
    trained.model.close()
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "shared").eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# RoLoRA.


def test_rolora_is_a_loop_that_alternates(recipe: Recipe, byte_base: Path, tmp_path: Path) -> None:
    config = recipe(f"model.base={byte_base}", "method.name=rolora", *PLAIN)
    plain = Plain(config)
    pairs: Pairs = lora_layers(plain.start)
    for number in range(1, ROUNDS + 1):
        side, sent = number % 2, []  # B is 1, A is 0
        for client in plain.clients:
            mine = {m: leaf(pair[side]) for m, pair in pairs.items()}
            plain.train(
                list(mine.values()),
                client,
                number,
                lambda mine=mine, side=side, pairs=pairs: {
                    m: SCALE * (mine[m] @ A if side else B @ mine[m]) for m, (A, B) in pairs.items()
                },
            )
            sent.append(mine)
        new = {m: mean([s[m] for s in sent]) for m in pairs}
        pairs = {m: (A, new[m]) if side else (new[m], B) for m, (A, B) in pairs.items()}

    server = state_after(config, tmp_path / "run")
    compare_factors(lora_layers(server.shared.tensors()), pairs, plain)
    for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines():
        log = json.loads(line)
        for groups in log["groups"]["uplink"].values():
            assert groups.keys() == {f"attention LoRA {'B' if log['number'] % 2 else 'A'}"}
        for groups in log["groups"]["downlink"].values():
            assert groups.keys() == {"attention LoRA A", "attention LoRA B"}


def test_rolora_takes_the_rounds_factor_and_its_mean_is_exact() -> None:
    method, server = RoLoRA(), Server(Payload.of(drawn(3, 0)), ROWS)
    for number in range(4):
        factor, other = "BA" if number % 2 == 0 else "AB"
        before = server.shared.tensors()
        assert set(method.uplink(server, "a").names) == only(before, factor).keys()
        sent = {c: only(drawn(3, 10 * number + i), factor) for i, c in enumerate("abc", 1)}
        method.aggregate(server, updates(sent))
        after = server.shared.tensors()
        assert all(torch.equal(after[n], t) for n, t in only(before, other).items())
        whole = {c: {**before, **t} for c, t in sent.items()}
        close_products(products(after), mean_product(whole))
        server.round += 1


# FedSVD.


def test_fedsvd_is_a_loop_with_a_dense_svd(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe("method.name=fedsvd", *PLAIN)
    plain = Plain(config)
    pairs: Pairs = lora_layers(plain.start)
    for number in range(1, ROUNDS + 1):
        sent = []
        for client in plain.clients:
            mine = {m: leaf(B) for m, (_, B) in pairs.items()}
            plain.train(
                list(mine.values()),
                client,
                number,
                lambda mine=mine, pairs=pairs: {m: SCALE * mine[m] @ A for m, (A, _) in pairs.items()},
            )
            sent.append(mine)
        new = {}
        for m, (A, _) in pairs.items():
            U, S, Vt = torch.linalg.svd((mean([s[m] for s in sent]) @ A).double())
            rank = len(A)
            signs = torch.stack([row[row.abs().argmax()].sign() for row in Vt[:rank]])
            new[m] = (signs[:, None] * Vt[:rank]).float(), (U[:, :rank] * S[:rank] * signs).float()
        pairs = new

    server = state_after(config, tmp_path / "run")
    found = lora_layers(server.shared.tensors() | server.memory)
    compare((B @ A, pairs[m][1] @ pairs[m][0], torch.zeros(())) for m, (A, B) in found.items())
    compare((B.norm(dim=0), pairs[m][1].norm(dim=0), torch.zeros(())) for m, (_, B) in found.items())
    for A, _ in found.values():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)


def test_fedsvd_changes_factors_and_not_the_product() -> None:
    method, start = FedSVD(), drawn(3, 0)
    A = {f"derived.{n}": t for n, t in only(start, "A").items()}
    server = Server(Payload.of(only(start, "B") | A), ROWS)
    method.start(server)
    current = start
    for number in range(3):
        assert method.broadcast(server, "a").tensors().keys() == only(start, "B").keys() | A.keys()
        assert set(method.uplink(server, "a").names) == only(start, "B").keys()
        sent = {c: only(drawn(3, 10 * number + i), "B") for i, c in enumerate("abc", 1)}
        method.aggregate(server, updates(sent))
        expected = mean_product({c: {**current, **t} for c, t in sent.items()})
        current = method.adapter(server)
        close_products(products(current), expected)
        for layer, (rows, columns) in lora_layers(current).items():
            torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)
            gram = columns.T @ columns
            singular = np.linalg.svd(expected[layer])[1][:3]
            torch.testing.assert_close(gram, torch.diag(torch.tensor(singular**2).float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [("compression.kind=int8",), ("privacy.noise=local", "privacy.clip=1e3", "privacy.noise_multiplier=1e-7")],
    ids=["packed", "noise"],
)
def test_fedsvd_protects_b_alone(recipe: Recipe, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """A goes down, and what a defence changes is the update of B."""
    assume_identity(1)
    plain, changed = (
        state_after(recipe("method.name=fedsvd", *PLAIN, "federation.rounds=2", *more), tmp_path / str(len(more)))
        for more in ((), settings)
    )
    ours, theirs = (lora_layers(s.shared.tensors() | s.memory) for s in (changed, plain))
    for A, _ in ours.values():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
    whole, noised = (torch.cat([(B @ A).flatten() for A, B in pairs.values()]) for pairs in (theirs, ours))
    assert 0 < (noised - whole).norm() < 0.2 * whole.norm()
