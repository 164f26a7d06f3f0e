"""Checkpoints that store codes are refused by name, or loaded as the values that the codes stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexperts.config.model import ModelConfig
from flexperts.errors import ModelError
from flexperts.modeling.load import load_base
from flexperts.testing import save_tiny_base

FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
"""The values of the 16 codes (OCP Microscaling formats 1.0, E2M1)."""
BIAS = 127
"""A block's scale s stands for the factor 2^(s - 127)."""


def marked(folder: Path, **quantization: object) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    return folder


def test_mxfp4_experts_are_their_values(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = save_tiny_base(tmp_path / "base", "gpt_oss", hidden_size=64, intermediate_size=32)
    (file,) = folder.glob("*.safetensors")
    tensors, expected, stream = load_file(file), {}, torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(0, 16, (experts, outputs, inputs), generator=stream)
        scales = torch.randint(BIAS - 7, BIAS, (experts, outputs, inputs // 32), generator=stream)
        factors = 2.0 ** (scales.repeat_interleave(32, -1) - BIAS)
        expected[name] = (torch.tensor(FP4)[codes] * factors).mT
        low, high = codes.view(experts, outputs, inputs // 32, 16, 2).unbind(-1)
        tensors |= {f"{name}_blocks": (low | high << 4).byte(), f"{name}_scales": scales.byte()}
    save_file(tensors, file, metadata={"format": "pt"})
    marked(folder, quant_method="mxfp4")
    assert len(expected) == 4
    with pytest.raises(ModelError, match=r"stores weights as codes \(mxfp4\).*set model.dequantize = true"):
        load_base(ModelConfig(base=str(folder)))
    model = load_base(ModelConfig(base=str(folder), dequantize=True)).model
    for name, values in expected.items():
        assert model.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(name).float(), values), name


def test_fp8_weights_are_their_values(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "base", "qwen3_moe")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    codes, scale = tensors[name].mul(8).to(torch.float8_e4m3fn), torch.tensor([[0.125]])
    save_file(tensors | {name: codes, f"{name}_scale_inv": scale}, file, metadata={"format": "pt"})
    marked(folder, quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    with pytest.raises(ModelError, match=r"stores weights as codes \(fp8\)"):
        load_base(ModelConfig(base=str(folder)))
    model = load_base(ModelConfig(base=str(folder), dtype="float32", dequantize=True)).model
    assert torch.allclose(model.get_parameter(name), codes.float() * 0.125, rtol=2**-7, atol=0)


def test_what_transformers_cannot_make_values_of_is_refused(tmp_path: Path) -> None:
    folder = marked(save_tiny_base(tmp_path / "base"), quant_method="gptq", bits=4)
    with pytest.raises(ModelError, match=r"codes \(gptq\).*use a checkpoint of this model in full precision"):
        load_base(ModelConfig(base=str(folder), dequantize=True))
