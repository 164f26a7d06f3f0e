"""Grafts baked into shared experts: nothing is lost where nothing need be, and what is lost is measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexperts.artifacts import RunDirectory
from flexperts.config.run import RunConfig
from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.data.rows import Row
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, ConfigError
from flexperts.export import baking
from flexperts.export.baking import BakingLoss, bake
from flexperts.export.content import logits_of
from flexperts.export.exporting import export_run
from flexperts.export.gguf import folder as folders
from flexperts.export.verification import LogitDifference
from flexperts.modeling.forward import response_logits
from flexperts.testing import byte_tokenizer, tiny_model

from .test_code import TOKENS, grafts_of
from .test_export import SHORT
from .test_gguf import smol

EXAMPLES: list[Example] = PromptEncoder(byte_tokenizer()).encode_all(
    [Row(f"Case {number}?", f"It is a {word}.") for number, word in enumerate(("fox", "jay", "hen", "owl") * 3)]
)
PAD = 258
FAMILIES: dict[str, Callable[[], Any]] = {
    "smol-moe's kind": lambda: smol(vocab_size=260),
    "deepseek_v2": lambda: tiny_model("deepseek_v2"),
    "dots1": lambda: tiny_model("dots1"),
}


@pytest.mark.parametrize("difference", [False, True], ids=["experts", "differences"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_lost_where_gates_are_constant(family: str, difference: bool, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    grafts = grafts_of(model, difference=difference)
    for graft in grafts:
        torch.nn.init.zeros_(graft.graft_gate_weight)
    with_grafts = logits_of(model, TOKENS)
    grafts.detach()
    effect = LogitDifference.between(logits_of(model, TOKENS), with_grafts).relative
    bake(model, [grafts], EXAMPLES, PAD, seed=0)
    assert LogitDifference.between(logits_of(model, TOKENS), with_grafts).relative < min(1e-3, effect / 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert LogitDifference.between(logits_of(loaded, TOKENS), logits_of(model, TOKENS)).relative < 1e-5


def test_what_gates_do_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Least squares get closer to the answers' next tokens than the mean of the gates."""
    found, batch = {}, pad_batch(EXAMPLES, PAD)
    for name, ridge in (("mean gates", 1e6), ("least squares", 1e-3)):
        monkeypatch.setattr(baking, "_RIDGE", ridge)
        model = smol(vocab_size=260)
        grafts = grafts_of(model)
        with torch.no_grad():
            for own, parameter in grafts.named_parameters():
                parameter.mul_(40 if "gate" in own else 10)
            wanted = response_logits(model, batch)
            grafts.detach()
            bake(model, [grafts], EXAMPLES, PAD, seed=0)
            found[name] = LogitDifference.between(response_logits(model, batch), wanted).relative
    assert found["least squares"] < found["mean gates"] / 2


def test_layers_without_grafts_get_neurons_that_do_nothing() -> None:
    model = smol(vocab_size=260, num_hidden_layers=3, mlp_only_layers=[])
    whole = grafts_of(model)
    del whole.layers[next(iter(whole.layers))]
    whole.detach()
    before = model.model.layers[0].mlp.shared_expert.gate_proj.weight.shape[0]
    bake(model, [whole], EXAMPLES, PAD, seed=0)
    shared = model.model.layers[0].mlp.shared_expert
    assert shared.gate_proj.weight.shape[0] == model.config.shared_expert_intermediate_size > before
    assert not shared.down_proj.weight[:, before:].any()
    assert not shared.gate_proj.weight[before:].any()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_without_a_shared_expert_it_is_refused(family: str) -> None:
    model = tiny_model(family)
    grafts = grafts_of(model)
    grafts.detach()
    with pytest.raises(ConfigError, match="no shared expert that could take in"):
        bake(model, [grafts], EXAMPLES, PAD, seed=0)


def test_a_loss_beyond_the_limit_is_refused() -> None:
    loss = BakingLoss(20, (0.5, 0.56), (40.0, 39.0))
    loss.check(0.1)
    with pytest.raises(ArtifactError, match=r"loses 0\.060 nats per token on 20 rows, more than --max-loss 0\.05"):
        loss.check(0.05)
    with pytest.raises(ArtifactError):
        BakingLoss(20, (0.5, float("nan")), (40.0, 39.0)).check(0.1)


@pytest.fixture(scope="module")
def run(recipe: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_federation(recipe(*SHORT, "method.name=flex", "graft.output=expert"), out)
    return out


def test_a_baked_export_is_stock_and_says_what_it_lost(run: Path, tmp_path: Path) -> None:
    done = export_run(run, tmp_path / "out", client="clinic", baked=True, max_loss=1.0, check=False)
    assert done.baking is not None
    scores = RunDirectory(run).summary()["clients"]["clinic"]["nll"]
    assert done.baking.nll[0] == pytest.approx(scores["personalized"], abs=1e-3)
    assert not list(done.folder.glob("*.py"))
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    card = (done.folder / "README.md").read_text()
    assert str(done.baking) in card
    assert "grafted experts" in card
    assert "trust_remote_code" not in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(done.folder), AutoTokenizer.from_pretrained(done.folder)
    assert model.config.shared_expert_intermediate_size == 48
    assert model.generate(**tokenizer("Say hi.", return_tensors="pt"), max_new_tokens=2).shape[1] > 2


def test_a_baked_model_goes_on_to_gguf(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "has_llama_cpp", lambda: False)
    done = export_run(run, tmp_path / "out", client="clinic", form="gguf", baked=True, max_loss=1.0)
    [file] = done.folder.glob("*.gguf")
    shapes = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(file).tensors}
    assert shapes["blk.0.ffn_up_shexp.weight"] == (32, 48)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"max_loss": -1e6}, ArtifactError, "more than --max-loss"),
        ({"form": "personal"}, ConfigError, "--bake of --form personal"),
        ({"state": "global"}, ConfigError, "the model has no grafts"),
    ],
)
def test_what_cannot_be_baked_is_refused(
    run: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=re.escape(said)):
        export_run(run, tmp_path / "out", client="clinic", baked=True, **options)
    assert not list(tmp_path.iterdir())
