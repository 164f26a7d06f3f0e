"""Whole runs on a card: resumed elsewhere, exported, served, with experts in the CPU's memory or in fewer bits."""

from __future__ import annotations

import queue
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from card import counts
from flwr.app import RecordDict
from safetensors.torch import load_file
from test_budgets import METHODS
from test_training import CHECKPOINTING, SMALL, loaded

from flexperts.artifacts import RunDirectory
from flexperts.client.answer import read_ahead
from flexperts.client.client import Client
from flexperts.config.run import RunConfig
from flexperts.costs.speed import Workload, set_up, train
from flexperts.engines import in_process
from flexperts.engines.run import run_federation
from flexperts.environment import DEVICE
from flexperts.errors import ArtifactError
from flexperts.export.exporting import export_run
from flexperts.finished.trained import TrainedRun
from flexperts.moe.quantized import QuantizedTensor
from flexperts.observer import Observer
from flexperts.parameters.store import PersonalStore, load_personal
from flexperts.serving.contract import ModelName, Piece, Sampling
from flexperts.serving.engine.engine import ServingEngine

Recipe = Callable[..., RunConfig]
QUANTIZED = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra")


class StoppedError(Exception):
    """The run is broken off."""


class StopAfterRound(Observer):
    def round(self, record: dict[str, Any]) -> None:
        raise StoppedError


def ask(engine: ServingEngine, model: ModelName, sampling: Sampling) -> str:
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    prompt = engine.prompt_tokens([{"role": "user", "content": "Who?"}], model)
    engine.submit(model, prompt, sampling, pieces.put)
    text = ""
    while (piece := pieces.get(timeout=60)).finish is None:
        text += piece.text
    assert piece.error is None
    return text + piece.text


def states(folder: Path) -> dict[Path, dict[str, torch.Tensor]]:
    return {file.relative_to(folder): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_federation(recipe(*SMALL, "federation.rounds=2"), out)
    return out


def test_a_run_resumes_on_another_card_with_the_same_bits(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(*SMALL, "federation.rounds=2")
    monkeypatch.setenv(DEVICE, "cuda:1")
    with pytest.raises(StoppedError):
        run_federation(config, tmp_path / "run", StopAfterRound())
    monkeypatch.setenv(DEVICE, "cuda:0")
    run_federation(config, tmp_path / "run", resume=True)
    expected, found = states(finished), states(tmp_path / "run")
    assert expected.keys() == found.keys()
    for file, tensors in expected.items():
        assert all(torch.equal(tensors[name], found[file][name]) for name in tensors), file


def test_a_card_reads_the_next_clients_state_ahead_with_the_same_bits(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, str]] = []

    def noted(kind: str, content: RecordDict, client: Client) -> None:
        begun.append((client.name, kind))
        read_ahead(kind, content, client)

    monkeypatch.setattr(in_process, "read_ahead", noted)
    counts.reset()
    run_federation(recipe(*SMALL, "federation.rounds=2"), tmp_path / "ahead")
    others = sorted(RunDirectory(finished).summary()["clients"])[1:]  # nothing comes before the first one
    turns = [each for each in begun if not each[1].startswith("query")]
    assert turns == [(name, kind) for kind in ("train", "train", "evaluate") for name in others]
    assert counts.pinned > 0
    monkeypatch.setattr(in_process, "read_ahead", lambda *_: None)
    counts.reset()
    run_federation(recipe(*SMALL, "federation.rounds=2"), tmp_path / "not")
    assert counts.pinned == 0
    ahead, without = states(tmp_path / "ahead"), states(tmp_path / "not")
    assert ahead.keys() == without.keys()
    for file, tensors in ahead.items():
        assert all(torch.equal(tensors[name], without[file][name]) for name in tensors), file


def test_a_state_that_is_read_ahead_is_the_one_that_is_asked_for(finished: Path) -> None:
    path = finished / "personal" / "clinic.safetensors"
    store = PersonalStore(path, load_personal(path)[1].base)
    for up_to, asked in ((2, 2), (2, 1), (1, 2)):
        store.read_ahead(up_to)
        found = store.load(asked)
        assert found is not None
        assert found[1].round == asked
    store.read_ahead(0)
    with pytest.raises(ArtifactError, match="is of round 2"):
        store.load(0)


def test_what_a_card_trained_is_exported(finished: Path, tmp_path: Path) -> None:
    export = export_run(finished, tmp_path / "adapter", form="adapter", check=False)
    assert (export.folder / "adapter_model.safetensors").is_file()
    export = export_run(finished, tmp_path / "whole", client="clinic", check=False)
    assert any(export.folder.glob("*.safetensors"))


def test_a_card_serves_drawn_and_likeliest_answers(finished: Path) -> None:
    trained = TrainedRun(finished)
    plain = trained.generate("clinic", "Who?", max_new_tokens=3)
    engine = ServingEngine(trained, max_rows=4)
    try:
        model = next(m for m in engine.models if (m.client, m.state) == ("clinic", "personalized"))
        likeliest = ask(engine, model, Sampling(3))
        drawn = [ask(engine, model, Sampling(3, temperature=0.9, top_p=0.9, seed=1)) for _ in range(2)]
    finally:
        engine.close()
    assert likeliest.strip() == plain
    assert drawn[0] == drawn[1]


def test_a_run_with_experts_in_the_cpus_memory_has_the_same_bits(recipe: Recipe, tmp_path: Path) -> None:
    for name, more in (("here", ()), ("there", ('model.device_map={"model.layers.1" = "cpu"}',))):
        run_federation(recipe(*SMALL, CHECKPOINTING, "graft.rank=4", *more), tmp_path / name)
    expected, found = states(tmp_path / "here"), states(tmp_path / "there")
    assert len(expected) > 2
    for file, tensors in expected.items():
        assert all(torch.equal(tensors[name], found[file][name]) for name in tensors), file


@QUANTIZED
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantized_base_trains(recipe: Recipe, tmp_path: Path, scheme: str) -> None:
    run_federation(recipe(*SMALL, f"model.quantization={scheme}"), tmp_path / "run")


def losses_on(place: str, folder: Path, method: tuple[str, ...], scheme: str) -> list[float]:
    """Return a quantized base's losses in three steps; codes, scales and what is trained must be in one place."""
    losses: list[float] = []
    settings = ("model.precision=fp32", f"model.quantization={scheme}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEVICE, place)
        base, _ = loaded(folder, *settings)
    coded = [p for p in base.model.parameters() if isinstance(p, QuantizedTensor)]
    assert {str(t.device) for weight in coded for t in (weight, weight.codes, weight.scales)} == {place}
    with set_up(base, method, settings) as (model, split, config):
        assert split is not None
        steps = Workload(rows=2, prompt=16, response=8, steps=3)
        train(model, split, config, steps, lambda loss, _: losses.append(loss))
        assert {str(parameter.device) for parameter in split.trained.values()} == {place}
    return losses


@QUANTIZED
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_base_is_on_one_card_and_learns_as_on_a_cpu(byte_base: Path, scheme: str, method: str) -> None:
    expected = losses_on("cpu", byte_base, METHODS[method], scheme)
    assert losses_on("cuda:1", byte_base, METHODS[method], scheme) == pytest.approx(expected, rel=1e-3)
    assert expected[2] < expected[0]
