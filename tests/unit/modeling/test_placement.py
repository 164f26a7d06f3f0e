"""Where a base lies changes nothing but memory: shards, disk, and the experts that a graft reads from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flexperts.config.model import ModelConfig
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, ModelError
from flexperts.modeling.load import LoadedBase, load_base
from flexperts.modeling.placement import placement
from flexperts.moe.experts import find_experts
from flexperts.recipe import parse_recipe
from flexperts.testing import byte_tokenizer, tiny_model

TOKENS = torch.arange(1, 33)[None]
ON_DISK = "model.layers.1"
MAPS = Path("/proc/self/maps")


def load(folder: Path, **settings: object) -> LoadedBase:
    return load_base(ModelConfig(base=str(folder), dtype="float32", precision="fp32", **settings))  # type: ignore[arg-type]


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.is_meta}


def test_shards_are_one_base(tiny_base: Path, tmp_path: Path) -> None:
    whole = load(tiny_base)
    whole.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    loaded = load(tmp_path / "shards")
    assert loaded.fingerprint == whole.fingerprint
    assert torch.equal(loaded.model(TOKENS).logits, whole.model(TOKENS).logits)


def test_experts_on_disk_compute_and_are_read_as_in_memory(tiny_base: Path, tmp_path: Path) -> None:
    here = load(tiny_base)
    there = load(tiny_base, device_map={ON_DISK: "disk"}, offload_folder=str(tmp_path / "off"))
    experts = find_experts(there.model)
    assert on_meta(there.model) == {f"{experts[1].name}.{name}" for name in ("gate_up_proj", "down_proj")}
    assert there.fingerprint == here.fingerprint
    assert torch.equal(there.model(TOKENS).logits, here.model(TOKENS).logits)
    for ours, theirs in zip(experts, find_experts(here.model), strict=True):
        assert (ours.width, ours.dtype, ours.device) == (theirs.width, theirs.dtype, theirs.device)
        for index in range(ours.num_experts):
            for (name, values), (_, same) in zip(
                ours.expert(index).items(), theirs.expert(index).items(), strict=True
            ):
                assert torch.equal(values, same), (ours.name, index, name)
    assert on_meta(there.model)  # reading has brought nothing back


@pytest.mark.parametrize("rank", ["full", "4"])
def test_a_run_with_experts_on_disk_is_the_run_in_memory(
    rank: str, recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = f"graft.rank={rank}", "federation.rounds=1", "training.gradient_checkpointing=true"
    run_federation(recipe(*settings), tmp_path / "here")
    moved = recipe(
        *settings, f'model.device_map={{"{ON_DISK}" = "disk"}}', f'model.offload_folder="{tmp_path / "off"}"'
    )
    run_federation(moved, tmp_path / "there")
    files = sorted(p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*.safetensors"))
    assert len(files) > 4
    for file in files:
        ours, theirs = load_file(tmp_path / "here" / file), load_file(tmp_path / "there" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


def test_auto_fills_the_device_with_experts_then_the_disk(tiny_base: Path, tmp_path: Path) -> None:
    model = load(tiny_base).model
    layer = sum(p.numel() * 4 for p in find_experts(model)[0].stored)
    rest = sum(p.numel() * 4 for p in model.parameters()) - 2 * layer
    for room, expected in ((rest + 2 * layer, 0), (rest + layer, 1), (rest, 2), (0, 2)):
        loaded = load(
            tiny_base,
            device_map="auto",
            max_memory={"device": str(room)},
            offload_folder=str(tmp_path / str(room)),
        )
        assert len(on_meta(loaded.model)) == 2 * expected
        assert all("experts" in name for name in on_meta(loaded.model))


def test_on_a_gpu_what_does_not_fit_goes_to_the_cpu_then_to_disk() -> None:
    model = tiny_model("olmoe", num_hidden_layers=4)
    size = sum(p.numel() * 4 for p in find_experts(model)[0].stored)
    rest = sum(p.numel() * 4 for p in model.parameters()) - 4 * size
    room = {"device": str(rest + size), "cpu": str(2 * size)}
    config = ModelConfig(dtype="float32", precision="fp32", device_map="auto", max_memory=room)  # type: ignore[arg-type]
    places = placement(config, model.config, torch.device("cuda", 0))["device_map"]
    experts = [place for name, place in places.items() if "experts" in name]
    assert experts == ["cuda:0", "cpu", "cpu", "disk"]
    assert {place for name, place in places.items() if "experts" not in name} == {"cuda:0"}


def test_an_unknown_module_is_refused_with_a_hint(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean 'model.layers.1'"):
        load(tiny_base, device_map={"model.layer.1": "disk"})


def test_a_size_that_is_none_is_refused(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match=r"model.max_memory.device = 'much'.*write it in a form such as '8GiB'"):
        load(tiny_base, device_map="auto", max_memory={"device": "much"})


def test_limits_without_auto_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_memory is for device_map = 'auto'"):
        parse_recipe("data.silos = {}", ['model.max_memory={cpu = "1GiB"}'])


def test_the_vocabularys_projection_sees_whole_rows(tiny_base: Path) -> None:
    model, seen = load(tiny_base).model, []
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].is_contiguous()))
    model(TOKENS.expand(2, -1), logits_to_keep=1)
    assert seen == [True]


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux")
def test_no_file_of_a_base_whose_experts_were_put_together_stays_mapped(tiny_base: Path) -> None:
    loaded = load(tiny_base)
    assert str(tiny_base) not in MAPS.read_text()
    assert loaded.model.lm_head.weight.abs().sum() > 0


def test_a_checkpoint_of_single_experts_is_what_these_tests_load(tiny_base: Path) -> None:
    assert any(".experts.0.up_proj" in name for name in load_file(tiny_base / "model.safetensors"))
