"""Multimodal models: grafts and LoRA go to the language model, and an image's tokens pass through both."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from flexperts.config.model import ModelConfig
from flexperts.modeling.load import load_base
from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts
from flexperts.parts.grafts import Grafts
from flexperts.testing import VOCABULARY, byte_tokenizer, draw_weights, tiny_settings

SETTINGS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("multimodal.toml").read_text(encoding="utf-8")
)
IMAGE = VOCABULARY - 1
"""The token in whose place a patch of the image is put."""
CLOSED = -200.0  # sigmoid underflows to exactly 0


def multimodal(kind: str) -> Any:
    settings = dict(SETTINGS[kind])
    settings["text_config"] = tiny_settings(settings.pop("text", None)) | settings.get("text_config", {})
    config = AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        draw_weights(model)
    return model.eval().requires_grad_(False)


BY_DEFAULT = {"dots3_note", "ernie4_5_vl_moe", "llama4", "qwen3_vl_moe"}
"""The types that every run of the tests builds; the others run with the mark ``families``."""


@pytest.fixture(
    params=[pytest.param(k, marks=[] if k in BY_DEFAULT else pytest.mark.families) for k in sorted(SETTINGS)]
)
def model(request: pytest.FixtureRequest) -> Any:
    return multimodal(request.param)


def grafts_of(model: Any, **settings: Any) -> Grafts:
    experts = find_experts(model)
    return Grafts(experts, {e.name: (1,) for e in experts}, **settings)


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_there_are_enough_of_them() -> None:
    assert len(SETTINGS) >= 16


def test_experts_and_lora_targets_lie_in_the_language_model(model: Any) -> None:
    language = {id(module) for module in model.get_decoder().modules()}
    assert len(find_experts(model)) >= 2
    for name in [e.name for e in find_experts(model)] + attention_linears(model):
        assert id(model.get_submodule(name)) in language, name


def test_a_closed_gate_is_the_base_on_text(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, input_ids=ids)
    grafts = grafts_of(model, gate_bias=CLOSED).attach()
    assert torch.equal(logits(model, input_ids=ids), before)
    for graft in grafts:
        graft.graft_gate_bias.data.zero_()
    assert not torch.equal(logits(model, input_ids=ids), before)
    grafts.detach()
    assert torch.equal(logits(model, input_ids=ids), before)


def test_gradients_reach_the_grafts_alone(model: Any, ids: torch.Tensor) -> None:
    grafts = grafts_of(model).attach()
    model(input_ids=ids, labels=ids).loss.backward()
    reached = {name for name, p in grafts.named_parameters() if p.grad is not None and p.grad.any()}
    # Experts that take image tokens only are not met by text.
    text = {name for name, _ in grafts.named_parameters() if "vision_moe" not in name}
    assert reached == text
    assert all(p.grad is None for p in model.parameters())


def test_a_checkpoint_loads_as_what_it_is_on_text(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Some types load as their language model alone, the others whole; on text there is no difference."""
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_base(ModelConfig(base=str(tmp_path), dtype="float32")).model
    before = logits(model, input_ids=ids)
    torch.testing.assert_close(logits(loaded, input_ids=ids), before)
    grafts_of(loaded, gate_bias=CLOSED).attach()
    torch.testing.assert_close(logits(loaded, input_ids=ids), before)


def picture(kind: str) -> dict[str, torch.Tensor]:
    """Return a text of one row with an image of 16 x 16 values, in patches of 4, merged two by two."""
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 250, (1, 11), generator=torch.Generator().manual_seed(0))
    if kind == "llama4":
        count, inputs = 4, {"pixel_values": pixels}
    else:
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(16, 3, 1, 4, 4)
        patches = patches.expand(16, 3, 2, 4, 4).reshape(16, -1)
        count, inputs = 4, {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    ids[0, 3 : 3 + count] = IMAGE
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, **inputs}


@pytest.mark.parametrize("kind", ["glm4v_moe", "llama4", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp"])
def test_a_closed_gate_is_the_base_on_an_image(kind: str) -> None:
    model, inputs = multimodal(kind), picture(kind)
    if kind == "llama4":
        inputs.pop("mm_token_type_ids")
    before = logits(model, **inputs)
    blank = logits(model, **{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})
    assert not torch.equal(before, blank)
    grafts = grafts_of(model, gate_bias=CLOSED).attach()
    assert torch.equal(logits(model, **inputs), before)
    for graft in grafts:
        graft.graft_gate_bias.data.zero_()
    assert not torch.equal(logits(model, **inputs), before)
