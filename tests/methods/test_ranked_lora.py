"""FLoRA, FlexLoRA, HetLoRA: server rules against dense float64 algebra, client steps on a tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexperts.client.client import Client, Request
from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import check_clients, run_federation
from flexperts.errors import ConfigError, FederationError
from flexperts.finished.trained import TrainedRun
from flexperts.methods.flora import FLoRA
from flexperts.methods.kit.ranks import truncated
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method, method_class
from flexperts.parameters.vector import Payload

Recipe = Callable[..., RunConfig]
Array = NDArray[np.float64]

RANKED = ("flora", "flexlora", "hetlora")
FULL = 4
LAYERS = {"q": (7, 9), "v": (5, 9)}  # out, in
ROWS = {"a": 5, "b": 1, "c": 3}
RANKS = {"a": 2, "b": 4, "c": 1}


def lora(rank: int, seed: int, layers: Mapping[str, tuple[int, int]] = LAYERS) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    made = {}
    for layer, (out, into) in layers.items():
        made[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, into, generator=stream)
        made[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(out, rank, generator=stream)
    return made


def pair(tensors: Mapping[str, Tensor], layer: str) -> tuple[Array, Array]:
    names = [f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"]
    A, B = (tensors[n].detach().double().numpy() for n in names)
    return A, B


def product(tensors: Mapping[str, Tensor], layer: str) -> Array:
    A, B = pair(tensors, layer)
    return B @ A


def update(client: str, tensors: Mapping[str, Tensor], **derived: float) -> Update:
    more = {f"derived.{n}": torch.tensor([value]) for n, value in derived.items()}
    return Update(client, Payload.of({**tensors, **more}), ROWS[client], {})


def server_of(start: Mapping[str, Tensor]) -> Server:
    return Server(Payload.of(start), ROWS)


def ranked(name: str, **options: Any) -> Any:
    method = method_class(name)
    return method(method.Options(ranks=RANKS, **options))


def best(matrix: Array, rank: int) -> Array:
    U, S, Vt = np.linalg.svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


# Ranks.


@pytest.mark.parametrize("name", RANKED)
def test_ranks_of_unknown_clients_or_above_the_adapters_are_refused(recipe: Recipe, name: str) -> None:
    config = recipe(f"method.name={name}", "method.options={ranks={shpo=2}}")
    with pytest.raises(ConfigError, match=r"method\.options: 'shpo': .*did you mean 'shop'"):
        check_clients(config, Workspace(config).clients)
    assert method_class(name).Options(ranks={"Zu\u0308rich": 2}).ranks == {"Zürich": 2}  # as the client is called
    config = recipe(f"method.name={name}", "method.options={ranks={shop=9}}")
    with pytest.raises(ConfigError, match=r"ranks.shop = 9: .* at most lora.rank = 8"):
        make_method(config.method).check(config)
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        make_method(recipe(f"method.name={name}", "method.options={ranks={shop=0}}").method)


@pytest.mark.parametrize("name", RANKED)
def test_a_client_with_a_rank_may_be_left_out(recipe: Recipe, name: str) -> None:
    """As a newcomer of a comparison, which joins the finished run."""
    config = recipe(f"method.name={name}", "method.options={ranks={shop=2}}", "data.leave_out=['shop']")
    check_clients(config, Workspace(config).clients)


@pytest.mark.parametrize("name", RANKED)
def test_rows_beyond_a_clients_rank_stay_zero_through_training(recipe: Recipe, tmp_path: Path, name: str) -> None:
    config = recipe(
        f"method.name={name}",
        "method.options={ranks={shop=3}}",
        "training.weight_decay=0.1",
        "training.lr=0.05",
        "lora.dropout=0.2",
    )
    client, server = client_of(config, "shop", tmp_path)
    trained = client.train(Request(client.method.broadcast(server, "shop"), None, 1))
    sent = trained.update.payload.check(client.method.uplink(server, "shop"), "shop").tensors()
    client.model.close()
    for name, parameter in trained.split.shared.items():
        inside, beyond = (
            (parameter[:3], parameter[3:]) if "lora_A" in name else (parameter[:, :3], parameter[:, 3:])
        )
        assert beyond.numel()
        assert not beyond.count_nonzero()
        assert inside.count_nonzero() == inside.numel()
        assert torch.equal(sent[name], inside)


def client_of(config: RunConfig, name: str, folder: Path) -> tuple[Client, Server]:
    workspace = Workspace(config)
    client = Client(name, workspace, ClientModel(workspace.base, config, make_method(config.method)), folder)
    server = Server(client.initial(None)[0], dict.fromkeys(workspace.clients, 1))
    client.method.start(server)
    return client, server


@pytest.mark.parametrize("name", RANKED)
def test_bad_updates_are_refused(name: str) -> None:
    method, server = ranked(name), server_of(lora(FULL, 0))
    good = {c: update(c, lora(RANKS[c], 1), rank=1) for c in "ac"}
    broken = update("c", {n: t * float("nan") for n, t in lora(1, 1).items()}, rank=1)
    for updates in ([], [good["c"], good["a"]], [good["a"], broken]):
        with pytest.raises(FederationError):
            method.aggregate(server, updates)


# FLoRA.


def test_flora_stacks_are_the_sum_of_the_clients_products_over_two_rounds() -> None:
    method, server = ranked("flora"), server_of(lora(FULL, 0))
    method.start(server)
    first = {c: lora(r, i) for i, (c, r) in enumerate(RANKS.items())}
    method.aggregate(server, [update(c, t) for c, t in first.items()])
    server.round = 1
    second = {c: lora(RANKS[c], 10 + i) for i, c in enumerate("ac")}  # b sits out
    method.aggregate(server, [update(c, t) for c, t in second.items()])
    server.round = 2
    adapter = method.adapter(server)
    for layer in LAYERS:
        wanted = sum(ROWS[c] / 9 * product(t, layer) for c, t in first.items())
        wanted = wanted + sum(ROWS[c] / 8 * product(t, layer) for c, t in second.items())
        np.testing.assert_allclose(product(adapter, layer), wanted, rtol=0, atol=1e-5)
        assert pair(adapter, layer)[0].shape[0] == 7 + 3


def test_flora_sends_what_a_client_has_not_seen() -> None:
    method, server = ranked("flora"), server_of(lora(FULL, 0))
    assert method.broadcast(server, "a").size == 0
    for number, who in enumerate(("abc", "ac", "a")):
        server.round = number
        method.aggregate(server, [update(c, lora(RANKS[c], number)) for c in who])
    server.round = 3
    rounds = {c: sorted({n.split(".")[2] for n in method.broadcast(server, c).tensors()}) for c in "abc"}
    assert rounds == {"a": ["3"], "b": ["1", "2", "3"], "c": ["2", "3"]}
    assert {n.split(".")[2] for n in method.final(server, "a").tensors()} == {"1", "2", "3"}
    assert all(n.startswith("derived.stack.") for n in method.final(server, "a").tensors())


def test_flora_starts_afresh_on_top_of_all_stacks(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, int], dict[str, Tensor]] = {}
    stacks: dict[tuple[str, int], int] = {}

    def spy(method: Any, turn: Any) -> Any:
        moment = turn.site.client, turn.round
        seen[moment] = {n: p.detach().clone() for n, p in turn.split.shared.items()}
        stacks[moment] = next(iter(turn.parts["stacks"].layers.values())).A.shape[0]
        return turn.fit()

    monkeypatch.setattr(FLoRA, "train", spy)
    run_federation(
        recipe("method.name=flora", "method.options={ranks={shop=2}}", "evaluation.max_new_tokens=1"),
        tmp_path / "run",
    )
    assert stacks == {(c, r): (r - 1) * (8 * 3 + 2) for c, r in seen}
    for name, A in seen["clinic", 1].items():
        if "lora_B" in name:
            assert not any(each[name].count_nonzero() for each in seen.values())
            continue
        assert not torch.equal(A, seen["law_firm", 1][name])
        assert not torch.equal(A[:2], seen["shop", 1][name][:2])
        assert seen["shop", 1][name][:2].count_nonzero()
        assert not seen["shop", 1][name][2:].count_nonzero()
        assert not torch.equal(A, seen["clinic", 2][name])


def test_flora_stacks_have_the_sum_of_the_ranks(recipe: Recipe, tmp_path: Path) -> None:
    """In a first SGD step B is 0, so A stays as drawn: one A for all clients would give every sum rank 2."""
    run_federation(
        recipe(
            "method.name=flora",
            "method.options={ranks={shop=1}}",
            "lora.rank=2",
            "training.local_steps=1",
            "training.optimizer=sgd",
            "federation.rounds=1",
            "evaluation.max_new_tokens=1",
        ),
        tmp_path / "run",
    )
    adapter = {
        n: t.double() for n, t in load_file(tmp_path / "run" / "shared" / "adapter_model.safetensors").items()
    }
    found = [name for name in adapter if "lora_A" in name]
    assert found
    for name in found:
        A, B = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        assert (B @ A).norm() > 0
        singular = torch.linalg.svdvals((B / B.norm()) @ (A / A.norm()))
        assert int((singular > 1e-6 * singular[0]).sum()) == 2 + 2 + 2 + 1, name


@pytest.mark.parametrize(
    ("name", "rank"), [("flora", 2 * (8 * 3 + 2)), ("flexlora", 8), ("hetlora", 8)], ids=RANKED
)
def test_the_adapter_folder_computes_the_global_state(
    recipe: Recipe, tmp_path: Path, tiny_base: Path, name: str, rank: int
) -> None:
    """Loaded by PEFT alone, it is what a client of full rank computes with."""
    options = "{ranks={shop=2}, gamma=1.0}" if name == "hetlora" else "{ranks={shop=2}}"
    config = recipe(
        f"method.name={name}", f"method.options={options}", "training.lr=0.05", "evaluation.max_new_tokens=1"
    )
    run_federation(config, tmp_path / "run")
    trained = TrainedRun(tmp_path / "run")
    ids = torch.arange(40).reshape(2, 20)
    with trained.client("clinic").in_state(trained.request("clinic"), "global") as (model, _), torch.no_grad():
        ours = model(input_ids=ids).logits
    trained.model.close()
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        peft = PeftModel.from_pretrained(base, tmp_path / "run" / "shared").eval()
        theirs = peft(input_ids=ids).logits
    assert peft.peft_config["default"].r == rank
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


# FlexLoRA.


@pytest.mark.parametrize("stack", [3, 6, 20], ids=["thin", "square", "wide"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncated_svd_is_the_dense_one(stack: int, rank: int) -> None:
    tensors = lora(stack, stack)
    last = lora(rank, 99)
    for layer in LAYERS:
        A, B = (torch.from_numpy(m).float() for m in pair(tensors, layer))
        kept = tuple(torch.from_numpy(m).float() for m in pair(last, layer))
        new_A, new_B = truncated(A, B, kept)  # type: ignore[arg-type]
        found = min(rank, stack, LAYERS[layer][0])
        dense = product(tensors, layer)
        result = (new_B.double() @ new_A.double()).numpy()
        np.testing.assert_allclose(result, best(dense, rank), atol=2e-5)
        singular = np.linalg.svd(dense)[1]
        np.testing.assert_allclose(new_B.double().norm(dim=0)[:found], singular[:found], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose((new_A @ new_A.T)[:found, :found], np.eye(found), atol=1e-5)
        assert torch.equal(new_A[found:], kept[0][found:])
        assert not new_B[:, found:].count_nonzero()
        assert (new_A[:found].gather(1, new_A[:found].abs().argmax(1, keepdim=True)) > 0).all()


def test_flexlora_sends_every_client_the_best_of_its_rank() -> None:
    method, server = ranked("flexlora"), server_of(lora(FULL, 0))
    sent = {c: lora(r, i) for i, (c, r) in enumerate(RANKS.items())}
    method.aggregate(server, [update(c, t) for c, t in sent.items()])
    for layer in LAYERS:
        dense = np.asarray(sum(ROWS[c] / 9 * product(t, layer) for c, t in sent.items()))
        np.testing.assert_allclose(product(method.adapter(server), layer), best(dense, FULL), atol=1e-5)
        for client, rank in RANKS.items():
            got = method.broadcast(server, client)
            assert got.manifest == method.uplink(server, client)
            assert pair(got.tensors(), layer)[0].shape[0] == rank
            np.testing.assert_allclose(product(got.tensors(), layer), best(dense, rank), atol=1e-5)


# HetLoRA.


def test_hetlora_weighs_zero_padded_factors_by_the_norm_of_the_product() -> None:
    method, start = ranked("hetlora"), lora(5, 0)
    server = server_of(start)
    told = {"a": 2, "b": 3, "c": 1}  # b prunes one row
    sent = {c: lora(r, i) for i, (c, r) in enumerate(RANKS.items())}
    method.aggregate(server, [update(c, t, rank=told[c]) for c, t in sent.items()])
    norms = {c: np.sqrt(sum(np.square(product(t, layer)).sum() for layer in LAYERS)) for c, t in sent.items()}
    for layer, (out, into) in LAYERS.items():
        A, B = np.zeros((5, into)), np.zeros((out, 5))
        for client, rank in RANKS.items():
            own_A, own_B = pair(sent[client], layer)
            share = norms[client] / sum(norms.values())
            A[:rank] += share * own_A
            B[:, :rank] += share * own_B
        A[3:], B[:, 3:] = pair(start, layer)[0][3:], pair(start, layer)[1][:, 3:]  # nobody goes on with them
        got = pair(server.shared.tensors(), layer)
        np.testing.assert_allclose(got[0], A, atol=1e-6)
        np.testing.assert_allclose(got[1], B, atol=1e-6)
    assert {c: method.rank(server, c) for c in ROWS} == told
    assert pair(method.broadcast(server, "b").tensors(), "q")[0].shape == (3, 9)
    assert dict(zip(*vars(method.uplink(server, "b")).values(), strict=True))["derived.rank"] == (1,)


def test_hetlora_weighs_rows_where_nobody_learned() -> None:
    method, server = ranked("hetlora"), server_of(lora(FULL, 0))
    sent = {c: {n: t * ("lora_A" in n) for n, t in lora(r, i).items()} for i, (c, r) in enumerate(RANKS.items())}
    method.aggregate(server, [update(c, t, rank=RANKS[c]) for c, t in sent.items()])
    row = pair(server.shared.tensors(), "q")[0][0]
    np.testing.assert_allclose(row, sum(ROWS[c] / 9 * pair(t, "q")[0][0] for c, t in sent.items()), atol=1e-6)


@pytest.mark.parametrize("rank", [0.0, 1.5, 3.0])
def test_hetlora_refuses_a_rank_that_cannot_be(rank: float) -> None:
    method, server = ranked("hetlora"), server_of(lora(FULL, 0))
    with pytest.raises(FederationError, match="reports the next rank"):
        method.aggregate(server, [update("a", lora(2, 0), rank=rank)])


def test_hetlora_tail() -> None:
    def tails(**options: Any) -> list[int]:
        return [ranked("hetlora", **options).tail(rank) for rank in (1, 2, 10, 100)]

    assert tails() == [1, 1, 9, 99]
    assert tails(gamma=0.29) == [1, 1, 2, 29]
    assert tails(gamma=0.5, min_rank=4) == [1, 2, 5, 50]
    assert tails(gamma=1.0) == [1, 2, 10, 100]


def trained_with(recipe: Recipe, folder: Path, start: Mapping[str, Tensor], *overrides: str) -> Any:
    config = recipe("method.name=hetlora", "training.local_steps=1", *overrides)
    client, _ = client_of(config, "shop", folder)
    trained = client.train(Request(Payload.of(start), None, 1))
    client.model.close()
    return trained.update.tensors()


def trained_start(recipe: Recipe, tmp_path: Path) -> dict[str, Tensor]:
    client, server = client_of(recipe("method.name=hetlora"), "shop", tmp_path / "start")
    client.model.close()
    shapes = server.shared.tensors()
    stream = torch.Generator().manual_seed(1)
    return {n: 0.1 * torch.randn(t.shape, generator=stream) for n, t in shapes.items()}


def test_hetlora_penalty_pulls_the_tail_as_its_gradient_says(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One SGD step with the penalty less one without is -lr lambda times the penalty's gradient."""
    monkeypatch.setattr("flexperts.methods.hetlora.clear_from", lambda tensors, tail: None)
    start, lr, strength, tail = trained_start(recipe, tmp_path), 0.1, 0.5, 4
    sgd = ("training.optimizer=sgd", f"training.lr={lr}", "training.max_grad_norm=1e9")
    runs = [
        trained_with(
            recipe, tmp_path / str(x), start, *sgd, f"method.options={{gamma=0.5, penalty={x}, min_rank=4}}"
        )
        for x in (0.0, strength)
    ]
    for name in (n for n in start if "lora_A" in n):
        A, B = (start[n].double() for n in (name, name.replace("lora_A", "lora_B")))
        norm_A, norm_B = A[tail:].norm(), B[:, tail:].norm()
        for key, wanted in ((name, norm_B * A / norm_A), (name.replace("lora_A", "lora_B"), norm_A * B / norm_B)):
            moved = (runs[1][key] - runs[0][key]).double()
            head, end = (moved[:tail], moved[tail:]) if key == name else (moved[:, :tail], moved[:, tail:])
            assert not head.count_nonzero()
            wanted = wanted[tail:] if key == name else wanted[:, tail:]
            torch.testing.assert_close(end, -lr * strength * wanted, rtol=1e-3, atol=1e-6)


def test_hetlora_prunes_a_tail_that_shrank_and_no_other(recipe: Recipe, tmp_path: Path) -> None:
    start = trained_start(recipe, tmp_path)
    press = "method.options={gamma=0.5, penalty=5.0}"
    pruned = trained_with(recipe, tmp_path / "pruned", start, press, "training.lr=0.01")
    assert pruned.pop("derived.rank").item() == 4
    for name, tensor in pruned.items():
        tail = tensor[4:] if "lora_A" in name else tensor[:, 4:]
        assert tail.shape[0 if "lora_A" in name else 1] == 4
        assert not tail.count_nonzero()
    fresh = {n: t * ("lora_A" in n) for n, t in start.items()}
    grown = trained_with(recipe, tmp_path / "grown", fresh, press)
    assert grown["derived.rank"].item() == 8
    kept = trained_with(recipe, tmp_path / "kept", start, "method.options={gamma=1.0, penalty=5.0}")
    assert kept["derived.rank"].item() == 8
    # The tail of an earlier, shorter rank: 4 of 8 rows came, 2 are the tail.
    short = {n: t[:4] if "lora_A" in n else t[:, :4] for n, t in start.items()}
    again = trained_with(recipe, tmp_path / "again", short, press, "training.lr=0.01")
    assert again.pop("derived.rank").item() == 2
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in short.items()}


def test_hetlora_ranks_shrink_over_a_run_and_so_do_the_bytes(recipe: Recipe, tmp_path: Path) -> None:
    options = "method.options={gamma=0.5, penalty=1.0, ranks={shop=2}, min_rank=2}"
    slow = ("training.optimizer=sgd", "training.lr=0.01")  # Adam's steps overshoot a tail as small as after round 1
    config = recipe("method.name=hetlora", options, *slow, "federation.rounds=3", "evaluation.max_new_tokens=1")
    run_federation(config, tmp_path / "run")
    rounds = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    down = [r["declared"]["downlink"] for r in rounds]
    up = [r["declared"]["uplink"] for r in rounds]
    assert all(u[c] == d[c] + 4 for u, d in zip(up, down, strict=True) for c in u)
    assert down[0]["clinic"] == down[1]["clinic"] == 4 * down[0]["shop"]  # nothing shrinks in round 1
    assert down[2]["clinic"] == down[0]["clinic"] // 2
    assert len({d["shop"] for d in down}) == 1
    kept = load_file(tmp_path / "run" / "personal" / "clinic.safetensors")
    assert list(kept) == ["memory.rank"]
