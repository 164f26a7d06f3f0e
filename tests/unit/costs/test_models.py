"""Configs that ship against what their makers publish; names and files that stand for a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from flexperts.costs.models import Description, describe, meta_base, shipped_configs
from flexperts.costs.plan import model_facts
from flexperts.errors import ModelError
from flexperts.smol_moe.build import base_spec
from flexperts.smol_moe.neuron_partition import load_neuron_partition
from flexperts.smol_moe.upcycle import moe_config
from flexperts.testing import save_tiny_base, tiny_model

PUBLISHED = {  # billions: all, active; MoE layers, N, K
    "qwen1.5-moe-a2.7b": (14.3, 2.7, 24, 60, 4),
    "deepseek-moe-16b": (16.4, 2.8, 27, 64, 6),
    "olmoe-1b-7b": (6.9, 1.3, 16, 64, 8),
    "mixtral-8x7b": (46.7, 12.9, 32, 8, 2),
    "qwen3-30b-a3b": (30.5, 3.3, 48, 128, 8),
    "deepseek-v2-lite": (15.7, 2.7, 26, 64, 6),
    "gpt-oss-20b": (20.9, 3.6, 24, 32, 4),
}
EMBEDDING = {"gpt-oss-20b": 201_088 * 2_880}
"""What a maker leaves out of its active parameters: the input embedding."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_config_has_the_published_size(name: str) -> None:
    description = describe(name)
    facts = model_facts(description, meta_base(description, "bfloat16"))
    parameters, active, *layout = PUBLISHED[name]
    assert facts.parameters / 1e9 == pytest.approx(parameters, rel=0.004)
    assert (facts.active_parameters - EMBEDDING.get(name, 0)) / 1e9 == pytest.approx(active, rel=0.02)
    assert [facts.moe_layers, facts.experts, facts.experts_per_token] == layout
    assert facts.weights == 2 * facts.parameters


def test_all_shipped_configs_are_checked() -> None:
    assert set(shipped_configs()) == {*PUBLISHED, "smol-moe"}


def test_the_shipped_base_is_described_as_it_is_built() -> None:
    """Against the config that the build makes of SmolLM2-135M and the shipped partition."""
    dense = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    built = Description("built", moe_config(dense, load_neuron_partition(base_spec("smol-moe").asset)))
    ours, theirs = (
        {n: tuple(p.shape) for n, p in meta_base(d, "bfloat16").model.named_parameters()}
        for d in (describe("smol-moe"), built)
    )
    assert ours == theirs


def test_a_base_without_weights_has_the_shapes_and_types_of_one_with(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "tiny", "qwen3_moe")
    live = dict(tiny_model("qwen3_moe", dtype=torch.bfloat16).named_parameters())
    for name in (str(folder), str(folder / "config.json")):
        planned = dict(meta_base(describe(name), "bfloat16").model.named_parameters())
        assert {n: (p.shape, p.dtype) for n, p in planned.items()} == {
            n: (p.shape, p.dtype) for n, p in live.items()
        }
        assert all(p.is_meta and not p.requires_grad for p in planned.values())


def test_hub_names_of_shipped_configs_need_no_network() -> None:
    assert describe("Qwen/Qwen1.5-MoE-A2.7B").config.hidden_size == 2048
    assert describe("qwen3-30B-A3B").config.num_experts == 128


def test_a_type_of_remote_code_is_refused_with_its_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "deepseek", "hidden_size": 2048}))
    with pytest.raises(ModelError, match="plan 'deepseek-moe-16b'"):
        describe(str(path))


@pytest.mark.parametrize("text", ["{", "[1]", '{"hidden_size": 8}', '{"model_type": "no such type"}'])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match="model"):
        describe(str(path))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        describe(str(tmp_path / "none.json"))


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **kwargs: object) -> None:
        raise OSError(f"no route to {name}")

    monkeypatch.setattr("flexperts.costs.models.AutoConfig.from_pretrained", offline)
    with pytest.raises(ModelError, match="did you mean 'mixtral-8x7b'"):
        describe("mixtral-8x7")


def test_a_quantized_config_is_planned_without_and_says_so(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    description = describe(str(folder))
    assert "quantized" in description.note
    assert meta_base(description, "float32").model.dtype == torch.float32
