"""Grafts as a file: built again as they were, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexperts.checked_file import read_sealed, write_sealed
from flexperts.errors import ArtifactError, GraftError
from flexperts.moe.experts import find_experts
from flexperts.parts.graft_file import load_grafts, save_grafts
from flexperts.parts.grafts import Grafts
from flexperts.testing import tiny_model

IDS = torch.arange(12).reshape(2, 6)


def grafts_on(model: Any, **settings: Any) -> Grafts:
    """Return trained grafts of two experts in the last layer."""
    experts = find_experts(model)
    grafts = Grafts(experts, {experts[-1].name: (2, 0)}, **settings)
    with torch.no_grad():
        for parameter in grafts.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return grafts


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 3, "alpha": 7.0}, {"difference": True}], ids=["full", "rank", "difference"]
)
def test_grafts_come_back_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_model()
    scales = {find_experts(model)[-1].name: (0.5, 1.5)}
    grafts = grafts_on(model, scales=scales, **settings)
    bare = model(IDS).logits
    grafts.attach()
    expected = model(IDS).logits
    grafts.detach()
    save_grafts(tmp_path / "grafts.safetensors", grafts)

    again = load_grafts(str(tmp_path / "grafts.safetensors"), find_experts(model))
    assert torch.equal(model(IDS).logits, bare)  # not attached yet
    again.attach()
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(expected, bare)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_the_base_is_known_by_its_experts_not_by_adapters_elsewhere(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    save_grafts(tmp_path / "grafts", grafts_on(model))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    load_grafts(tmp_path / "grafts", find_experts(model))


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_grafts(tmp_path / "grafts", grafts_on(tiny_model()))
    with pytest.raises(ArtifactError, match="trained on the experts of another base"):
        load_grafts(tmp_path / "grafts", find_experts(tiny_model(seed=1)))
    with pytest.raises(GraftError):
        load_grafts(tmp_path / "grafts", find_experts(tiny_model(num_hidden_layers=1)))


def test_what_is_no_file_of_grafts_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    path = tmp_path / "grafts"
    with pytest.raises(ArtifactError, match="no such file"):
        load_grafts(path, find_experts(model))
    save_grafts(path, grafts_on(model))
    tensors, meta = read_sealed(path, "flexperts-grafts-1")
    write_sealed(path, "flexperts-grafts-1", tensors, {**meta, "choice": 3})
    with pytest.raises(ArtifactError, match="metadata is not that of grafts"):
        load_grafts(path, find_experts(model))
    write_sealed(path, "flexperts-grafts-1", dict(list(tensors.items())[1:]), meta)
    with pytest.raises(ArtifactError, match="damaged"):
        load_grafts(path, find_experts(model))


def test_a_file_from_before_differences_holds_whole_outputs(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "grafts"
    save_grafts(path, grafts_on(model))
    tensors, meta = read_sealed(path, "flexperts-grafts-1")
    assert meta.pop("difference") is False
    write_sealed(path, "flexperts-grafts-1", tensors, meta)
    assert not any(graft.difference for graft in load_grafts(path, find_experts(model)))


def test_nothing_of_the_base_is_written(tmp_path: Path) -> None:
    model = tiny_model()
    save_grafts(tmp_path / "grafts", grafts_on(model, rank=2))
    tensors, _ = read_sealed(tmp_path / "grafts", "flexperts-grafts-1")
    assert sum(t.numel() for t in tensors.values()) < sum(p.numel() for p in model.parameters()) / 20
    assert {name.rsplit(".", 1)[-1] for name in tensors} == {
        "graft_gate_weight",
        "graft_gate_bias",
        "up_lora_A",
        "up_lora_B",
        "down_lora_A",
        "down_lora_B",
    }
