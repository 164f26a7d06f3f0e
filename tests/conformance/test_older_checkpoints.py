"""Checkpoints with one module per expert, as most on the hub are: they load fused, and graft."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexperts.config.model import ModelConfig
from flexperts.modeling.load import load_base
from flexperts.moe.experts import find_experts
from flexperts.parts.grafts import Grafts
from flexperts.testing import byte_tokenizer, tiny_model

Tensors = dict[str, Tensor]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")
BLOCK = ("mlp.", "block_sparse_moe.")
OLDER: dict[str, tuple[tuple[str, str, str], tuple[str, str]]] = {
    "deepseek_v3": (PROJECTIONS, ("mlp.", "mlp.")),
    "mixtral": (NUMBERED, BLOCK),
    "olmoe": (PROJECTIONS, ("mlp.", "mlp.")),
    "phimoe": (NUMBERED, ("mlp.router.", "block_sparse_moe.gate.")),
    "qwen2_moe": (PROJECTIONS, ("mlp.", "mlp.")),
    "qwen3_moe": (PROJECTIONS, ("mlp.", "mlp.")),
}
"""Family -> names of an expert's gate, up and down projection; how the rest of its block is called now and then."""


def older(family: str, tensors: Tensors) -> Tensors:
    """Return a fused model's tensors under the names and in the pieces that the family had before."""
    projections, (now, then) = OLDER[family]
    result: Tensors = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*\.)mlp\.experts\.(gate_up_proj|down_proj)", name):
            block = f"{match[1]}{'block_sparse_moe' if projections == NUMBERED else 'mlp'}"
            pieces = tensor.chunk(2, dim=1) if match[2] == "gate_up_proj" else (tensor,)
            names = projections[:2] if match[2] == "gate_up_proj" else projections[2:]
            for piece, part in zip(pieces, names, strict=True):
                for index, weight in enumerate(piece):
                    result[f"{block}.experts.{index}.{part}.weight"] = weight.clone()
        else:
            result[name.replace(now, then)] = tensor.clone()
    return result


def save_whole(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_shards(folder: Path, tensors: Tensors) -> None:
    """Every other tensor in another file: the experts of a layer, and gate and up of one, are torn apart."""
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, {"format": "pt"})
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


CASES = [(family, save_whole) for family in OLDER] + [("qwen3_moe", save_shards), ("mixtral", save_shards)]


@pytest.mark.parametrize(("kind", "save"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_an_older_checkpoint_loads_fused_and_grafts(
    kind: str, save: Callable[[Path, Tensors], None], ids: Tensor, tmp_path: Path
) -> None:
    fused = tiny_model(kind)
    tensors = older(kind, fused.state_dict())
    assert not any("gate_up_proj" in name for name in tensors)
    assert sum(".experts.3." in name for name in tensors) == 6
    fused.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    save(tmp_path, tensors)

    loaded = load_base(ModelConfig(base=str(tmp_path), dtype="float32")).model
    expected, found = fused.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []

    experts = find_experts(loaded)
    grafts = Grafts(experts, {e.name: (1,) for e in experts}, gate_bias=-200.0).attach()
    with torch.no_grad():
        before = fused(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, before)
        for graft in grafts:
            graft.graft_gate_bias.zero_()
        assert not torch.equal(loaded(input_ids=ids).logits, before)
