"""FFA-LoRA and FedSA-LoRA: one of LoRA's two factors travels, the other is frozen or stays at home."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexperts.client.client import Client, Request
from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.communication.messages import Update, payload_of
from flexperts.config.run import RunConfig
from flexperts.engines.grid import InProcessGrid
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.methods.ffa_lora import FFALoRA
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.parameters.store import load_personal, save_personal
from flexperts.parameters.vector import Payload

Recipe = Callable[..., RunConfig]


def clients_of(config: RunConfig, folder: Path, *names: str) -> list[Client]:
    workspace = Workspace(config)
    model = ClientModel(workspace.base, config, make_method(config.method))
    return [Client(name, workspace, model, folder) for name in names]


# FFA-LoRA.


def test_ffa_average_of_products_is_the_product_of_the_average() -> None:
    layer, rows = "base_model.model.q", {"a": 5, "b": 1, "c": 3}
    stream = torch.Generator().manual_seed(0)
    A = torch.randn(4, 9, generator=stream)
    initial = {f"{layer}.lora_B.weight": torch.zeros(7, 4), f"derived.{layer}.lora_A.weight": A}
    method, server = FFALoRA(), Server(Payload.of(initial), rows)
    method.start(server)
    assert server.shared.manifest.names == method.uplink(server, "a").names == (f"{layer}.lora_B.weight",)
    Bs = {c: torch.randn(7, 4, generator=stream) for c in rows}
    updates = [Update(c, Payload.of({f"{layer}.lora_B.weight": B}), rows[c], {}) for c, B in Bs.items()]
    method.aggregate(server, updates)
    adapter = {n.rpartition("lora_")[2][0]: t.double().numpy() for n, t in method.adapter(server).items()}
    wanted = sum(rows[c] / 9 * (B.double().numpy() @ A.double().numpy()) for c, B in Bs.items())
    np.testing.assert_allclose(adapter["B"] @ adapter["A"], wanted, atol=1e-5)
    assert np.array_equal(adapter["A"], A.double().numpy())


def test_ffa_a_never_moves_and_never_travels_in_a_round(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe("method.name=ffa_lora", "training.lr=0.05", "training.weight_decay=0.1")
    clinic, shop = clients_of(config, tmp_path, "clinic", "shop")
    first = clinic.initial(None)[0]
    assert first.manifest == shop.initial(None)[0].manifest
    assert np.array_equal(first.vector, shop.initial(None)[0].vector)
    server = Server(first, {"clinic": 1, "shop": 1})
    clinic.method.start(server)
    trained = clinic.train(Request(clinic.method.broadcast(server, "clinic"), None, 1))
    frozen = {n: p for n, p in trained.split.frozen.items() if "lora_" in n}
    clinic.model.close()
    assert frozen.keys() == server.memory.keys()
    assert all("lora_A" in n and torch.equal(p, server.memory[n]) for n, p in frozen.items())
    assert not trained.split.personal
    sent = trained.update.tensors()
    assert all("lora_B" in n and t.count_nonzero() for n, t in sent.items())


def test_ffa_adapter_folder_computes_the_global_state(recipe: Recipe, tmp_path: Path, tiny_base: Path) -> None:
    config = recipe("method.name=ffa_lora", "training.lr=0.05", "evaluation.max_new_tokens=1")
    run_federation(config, tmp_path / "run")
    trained = TrainedRun(tmp_path / "run")
    ids = torch.arange(40).reshape(2, 20)
    with trained.client("shop").in_state(trained.request("shop"), "global") as (model, _), torch.no_grad():
        ours = model(input_ids=ids).logits
    trained.model.close()
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "shared").eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


# FedSA-LoRA.


def test_fedsa_messages_hold_a_only_and_files_hold_b_only(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: set[str] = set()
    deliver = InProcessGrid._deliver

    def spy(grid: InProcessGrid, message: Message) -> Message:
        reply = deliver(grid, message)
        for each in (message, reply):
            names.update(payload_of(each.content, "anybody").manifest.names)
        return reply

    monkeypatch.setattr(InProcessGrid, "_deliver", spy)
    config = recipe("method.name=fedsa_lora", "training.lr=0.05", "evaluation.max_new_tokens=1")
    summary = run_federation(config, tmp_path / "run")
    assert names
    assert all(".lora_A." in n for n in names)
    assert not (tmp_path / "run" / "shared").exists()
    kept = {p.stem: load_file(p) for p in (tmp_path / "run" / "personal").glob("*.safetensors")}
    assert len(kept) == 4
    assert all(".lora_B." in n for tensors in kept.values() for n in tensors)
    for name in kept["shop"]:
        assert not torch.equal(kept["shop"][name], kept["clinic"][name])
    assert summary["mean"]["nll"]["global"] is None
    assert summary["mean"]["nll"]["personalized"] < summary["mean"]["nll"]["zero_shot"]
    per_client = [c["nll"]["personalized"] for c in summary["clients"].values()]
    assert summary["mean"]["nll"]["personalized"] == pytest.approx(np.mean(per_client))


def test_fedsa_b_never_moves_between_clients(recipe: Recipe, tmp_path: Path) -> None:
    """The next client on the same model is bit-identical whatever the B of the one before it."""
    config = recipe("method.name=fedsa_lora", "training.lr=0.05")
    clinic, shop = clients_of(config, tmp_path / "as_is", "clinic", "shop")
    start = Request(clinic.initial(None)[0], None, 1)
    for client in (clinic, shop):
        client.train(start)
    shutil.copytree(tmp_path / "as_is", tmp_path / "altered")
    alter(tmp_path / "altered" / "personal" / "clinic.safetensors")
    second = Request(start.payload, None, 2)
    results = {}
    for folder in ("as_is", "altered"):
        both = [Client(c.name, c.workspace, c.model, tmp_path / folder) for c in (clinic, shop)]
        results[folder] = [client.train(second).update.vector for client in both]
    shop.model.close()
    assert not np.array_equal(results["as_is"][0], results["altered"][0])
    assert np.array_equal(results["as_is"][1], results["altered"][1])
    files = [(tmp_path / f / "personal" / "shop.safetensors").read_bytes() for f in ("as_is", "altered")]
    assert files[0] == files[1]


def alter(path: Path) -> None:
    tensors, meta = load_personal(path)
    save_personal(path, {n: t + 0.3 for n, t in tensors.items()}, meta)


def test_fedsa_b_persists_from_round_to_round(recipe: Recipe, tmp_path: Path) -> None:
    """With no step's effect (lr near 0) the B of round 1 is that of round 2: it is neither reset nor replaced."""
    (shop,) = clients_of(recipe("method.name=fedsa_lora", "training.lr=0.05"), tmp_path, "shop")
    start = Request(shop.initial(None)[0], None, 1)
    shop.train(start)
    first = load_file(shop.store.path)
    shop.model.close()
    (again,) = clients_of(recipe("method.name=fedsa_lora", "training.lr=1e-30"), tmp_path, "shop")
    again.train(Request(start.payload, None, 2))
    again.model.close()
    second = load_file(again.store.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) and first[n].count_nonzero() for n in first)
