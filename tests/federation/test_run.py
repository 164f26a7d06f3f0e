"""A whole run on a tiny base: what it writes, what it repeats, what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.clients import load_clients, partition_manifest
from flexperts.data.rows import ClientRows
from flexperts.data.silos.generate import write_silos
from flexperts.engines.grid import InProcessGrid
from flexperts.engines.run import _NAMED, _rows_line, run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.recipe import parse_recipe

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
SHORT = ("training.local_steps=1", "evaluation.rows=1")


def files(folder: Path) -> dict[str, bytes]:
    kept = ("*.safetensors", "rounds.jsonl", "predictions/*")
    return {str(p.relative_to(folder)): p.read_bytes() for k in kept for p in sorted(folder.rglob(k))}


def without_seconds(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "sha256")} for line in lines]


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests only read."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_federation(recipe("training.lr=0.02"), out)
    return out


@pytest.mark.parametrize("method", ["fedavg", "flex", "local"])
def test_two_runs_with_one_seed_are_bit_identical(recipe: Recipe, tmp_path: Path, method: str) -> None:
    config = recipe(f"method.name={method}", "lora.dropout=0.1", "evaluation.rows=1")
    for name in ("a", "b"):
        run_federation(config, tmp_path / name, workspace=Workspace(config))
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    del first["rounds.jsonl"], second["rounds.jsonl"]
    assert len(first) >= 8
    assert first == second
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")


def test_another_seed_gives_other_weights(recipe: Recipe, tmp_path: Path) -> None:
    for seed in (0, 1):
        run_federation(recipe(f"seed={seed}", *SHORT), tmp_path / str(seed))
    weights = [(tmp_path / s / "shared" / "adapter_model.safetensors").read_bytes() for s in "01"]
    assert weights[0] != weights[1]


class ListGrid(InProcessGrid):
    """Answers as Flower's own grids do: with a list, in the order of arrival."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return list(super().send_and_receive(messages, timeout=timeout))[::-1]


def test_the_order_of_arrival_changes_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_federation(recipe(*SHORT), tmp_path / "lazy")
    monkeypatch.setattr("flexperts.engines.in_process.InProcessGrid", ListGrid)
    run_federation(recipe(*SHORT), tmp_path / "list")
    lazy, listed = files(tmp_path / "lazy"), files(tmp_path / "list")
    del lazy["rounds.jsonl"], listed["rounds.jsonl"]
    assert lazy == listed


def test_summary_has_what_is_promised(recipe: Recipe, tmp_path: Path) -> None:
    summary = run_federation(recipe("method.reference=fedavg"), tmp_path / "run")
    assert summary == RunDirectory(tmp_path / "run").summary()
    assert summary["method"] == "flex"
    assert summary["seed"] == 0
    assert len(summary["base"]["fingerprint"]) == 64
    assert sorted(summary["clients"]) == ["clinic", "help_desk", "law_firm", "shop"]
    states = {"zero_shot", "global", "personalized"}
    for kind in ("rouge_l", "nll"):
        assert summary["mean"][kind].keys() == summary["weighted_mean"][kind].keys() == states
        assert all(client[kind].keys() == states for client in summary["clients"].values())
    assert summary["bytes"]["personal_sent"] == 0
    assert summary["seconds"].keys() == {"setup", "training", "evaluation", "total"}
    reference = summary["reference"]
    assert reference["method"] == "fedavg"
    assert reference["mean"]["rouge_l"]["personalized"] is None
    assert reference["mean"]["nll"]["zero_shot"] == summary["mean"]["nll"]["zero_shot"]


def test_bytes_are_payload_plus_little(finished: Path) -> None:
    """On the tiny base the payload is 8 kB, so the fixed part of a message shows; on real ones it vanishes."""
    sizes = RunDirectory(finished).summary()["bytes"]
    adapter = load_file(finished / "shared" / "adapter_model.safetensors")
    payload = 4 * sum(tensor.numel() for tensor in adapter.values())
    for direction in ("uplink", "downlink"):
        assert payload < sizes[f"{direction}_per_client_per_round"] < payload + 2048
        assert sizes[f"{direction}_total"] == 8 * sizes[f"{direction}_per_client_per_round"]


def test_local_sends_nothing(recipe: Recipe, tmp_path: Path) -> None:
    sizes = run_federation(recipe("method.name=local"), tmp_path / "run")["bytes"]
    assert sizes["uplink_per_client_per_round"] < 2048
    assert not (tmp_path / "run" / "shared").exists()


def test_the_base_is_bit_identical_after_a_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("method.reference=local", "training.gradient_checkpointing=true", *SHORT)
    resident = Workspace(config)
    before = {name: tensor.clone() for name, tensor in resident.base.model.state_dict().items()}
    monkeypatch.setattr("flexperts.engines.run.Workspace", lambda config, given: resident)
    run_federation(config, tmp_path / "run")
    after = resident.base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(m._forward_hooks for m in resident.base.model.modules())


def test_training_learns_and_moves_only_what_it_should(recipe: Recipe, byte_base: Path, tmp_path: Path) -> None:
    config = recipe(f"model.base={byte_base}", "federation.rounds=6", "training.lr=0.05")
    summary = run_federation(config, tmp_path / "run")
    nll = summary["mean"]["nll"]
    assert nll["global"] < nll["zero_shot"] - 0.03
    assert nll["personalized"] < nll["global"]
    losses = [np.mean([c["loss"] for c in r["clients"].values()]) for r in without_seconds(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_shared_adapter_is_an_ordinary_peft_folder(finished: Path, tiny_base: Path) -> None:
    """Loaded by PEFT alone, without flexperts, it computes what the run's global state computes."""
    trained = TrainedRun(finished)
    ids = torch.arange(40).reshape(2, 20)
    with trained.client("shop").in_state(trained.request("shop"), "global") as (model, _), torch.no_grad():
        ours = model(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, finished / "shared").eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


def test_adapter_config_is_the_same_on_every_machine(finished: Path, tiny_base: Path) -> None:
    """Clients must agree on its text: no set in random order, no local path."""
    text = (finished / "shared" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == tiny_base.name
    assert str(tiny_base.parent) not in text


def test_evaluating_again_from_files_gives_the_same_scores(finished: Path) -> None:
    summary = RunDirectory(finished).summary()
    again = TrainedRun(finished).evaluate()
    for client, states in again.items():
        for state, scores in states.items():
            assert scores.rouge_l == summary["clients"][client]["rouge_l"][state]
            assert scores.nll == summary["clients"][client]["nll"][state]


def test_rounds_can_be_evaluated_on_the_way(recipe: Recipe, tmp_path: Path) -> None:
    run_federation(recipe("federation.rounds=3", "evaluation.every=2", *SHORT), tmp_path / "run")
    assert [bool(r["scores"]) for r in without_seconds(tmp_path / "run")] == [False, True, True]


def test_a_run_is_rebuilt_from_its_config(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe("graft.rank=2", "graft.experts=2", *SHORT)
    run_federation(config, tmp_path / "run")
    assert parse_recipe((tmp_path / "run" / "config.toml").read_text()) == config


def test_gradient_accumulation_equals_one_large_batch(recipe: Recipe, tmp_path: Path) -> None:
    """1 x 4 and 4 x 1 rows per step give the same weights but for the rounding of sums."""
    for size in (4, 1):
        run_federation(recipe(f"training.micro_batch_size={size}", "evaluation.rows=1"), tmp_path / str(size))
    one, many = (load_file(tmp_path / s / "shared" / "adapter_model.safetensors") for s in "41")
    assert all(torch.allclose(one[name], many[name], atol=2e-4) for name in one)


def test_a_run_keeps_who_had_which_rows_and_none_of_their_texts(recipe: Recipe, tmp_path: Path) -> None:
    """A pooled set divided by category: four clients of unequal kind, their counts and hashes in the run."""
    written = [p for p in sorted(write_silos(tmp_path / "silos", 0, 24, 4)) if p.suffix == ".jsonl"]
    rows = [json.loads(line) for path in written for line in path.read_text().splitlines()]
    pooled = tmp_path / "pooled.jsonl"
    pooled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = f'{{source = "{pooled}", by = "pathological", clients = 4}}'
    config = recipe(
        "data={partition = " + partition + "}", "federation.rounds=1", "evaluation.rows=2", "training.local_steps=1"
    )
    summary = run_federation(config, tmp_path / "run")
    text = (tmp_path / "run" / "partition.json").read_text()
    kept = json.loads(text)
    assert kept == partition_manifest(load_clients(config.data, config.seed))
    assert sorted(kept["clients"]) == sorted(summary["clients"]) == sorted({row["category"] for row in rows})
    held = sum(c["train_rows"] + c["test_rows"] for c in kept["clients"].values())
    assert held == len(rows)
    assert not [row for row in rows if row["response"] in text and len(row["response"]) > 20]


def test_numbers_of_rows_by_client_and_of_many_clients_their_range() -> None:
    def clients(count: int, validation: int = 0) -> dict[str, ClientRows]:
        sides = {n: (("r",) * (n + 1), ("r",) * 2, ("r",) * validation) for n in range(count)}
        return {f"c{n}": ClientRows(*each) for n, each in sides.items()}  # type: ignore[arg-type]

    assert _rows_line(clients(2)) == "rows (train/test): c0 1/2, c1 2/2"
    assert _rows_line(clients(2, 3)) == "rows (train/validation/test): c0 1/3/2, c1 2/3/2"
    assert (
        _rows_line(clients(_NAMED + 1)) == f"rows (train/test) of {_NAMED + 1} clients: 1 to {_NAMED + 1} / 2 to 2"
    )
