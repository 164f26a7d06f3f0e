"""Bases are data: pickled weights are refused, and a base's own code runs only where the recipe trusts it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from flexperts.config.model import ModelConfig
from flexperts.errors import ModelError
from flexperts.modeling.load import _library_bars, load_base
from flexperts.observer import Observer, observing

MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
)
CODE = """
from pathlib import Path
Path(r"{marker}").write_text("ran")
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM


class OwnConfig(Qwen2MoeConfig):
    model_type = "{kind}"


class OwnModel(Qwen2MoeForCausalLM):
    config_class = OwnConfig
"""


def config(folder: Path, **settings: bool) -> ModelConfig:
    return ModelConfig(base=str(folder), dtype="float32", precision="fp32", **settings)


def planted(base: Path, folder: Path, kind: str) -> Path:
    """Make a base of the tiny one that brings code, which leaves a file behind when it runs; return that file."""
    shutil.copytree(base, folder)
    marker = folder.parent / "ran"
    (folder / "own.py").write_text(CODE.format(marker=marker, kind=kind))
    settings = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings |= {"auto_map": classes, "model_type": kind}
    (folder / "config.json").write_text(json.dumps(settings))
    return marker


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep transformers' copies of planted code out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def test_a_base_that_needs_its_own_code_is_refused_without_running_it(tiny_base: Path, tmp_path: Path) -> None:
    marker = planted(tiny_base, tmp_path / "base", "own_moe")
    with pytest.raises(ModelError, match=r"own Python code to run; set model.trust_remote_code = true") as caught:
        load_base(config(tmp_path / "base"))
    assert str(tmp_path / "base") in str(caught.value)
    assert not marker.exists()


def test_trust_runs_it(tiny_base: Path, tmp_path: Path) -> None:
    marker = planted(tiny_base, tmp_path / "base", "own_moe")
    # As the code has it in memory: transformers cannot know how an unknown architecture's files were laid out.
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    kept = (tmp_path / "base" / "config.json").read_text()
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    (tmp_path / "base" / "config.json").write_text(kept)
    loaded = load_base(config(tmp_path / "base", trust_remote_code=True))
    assert marker.read_text() == "ran"
    assert type(loaded.model).__name__ == "OwnModel"


def test_weights_that_an_own_architecture_has_no_place_for_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    planted(tiny_base, tmp_path / "base", "own_moe")
    with pytest.raises(ModelError, match=r"experts\.down_proj.* would then be random"):
        load_base(config(tmp_path / "base", trust_remote_code=True))


def edited(base: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copy a base with other tensors in its file."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.2.up_proj.weight",
    ],
)
def test_a_missing_weight_is_refused_by_name(tiny_base: Path, tmp_path: Path, name: str) -> None:
    folder = edited(tiny_base, tmp_path / "base", lambda tensors: [tensors.pop(name)])
    with pytest.raises(ModelError) as caught:
        load_base(config(folder))
    assert name in str(caught.value)
    assert "would then be random" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.layers.7.mlp.gate.weight", "score.weight", "model.layers.0.mlp.router.weight"]
)
def test_a_weight_without_a_place_is_refused_by_name(tiny_base: Path, tmp_path: Path, name: str) -> None:
    folder = edited(tiny_base, tmp_path / "base", lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    with pytest.raises(ModelError, match=re.escape(name)):
        load_base(config(folder))


def test_a_weight_of_another_shape_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = edited(tiny_base, tmp_path / "base", lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ModelError, match="norm"):
        load_base(config(folder))


def test_a_known_architecture_is_loaded_without_the_code_beside_it(tiny_base: Path, tmp_path: Path) -> None:
    marker = planted(tiny_base, tmp_path / "base", "qwen2_moe")
    assert type(load_base(config(tmp_path / "base")).model).__name__ == "Qwen2MoeForCausalLM"
    assert not marker.exists()


class Planted:
    """What leaves a file behind where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return Path.write_text, (self.marker, "ran")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(tiny_base: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").unlink()
    torch.save(Planted(tmp_path / "ran"), folder / name)
    with pytest.raises(
        ModelError,
        match=rf"must be safetensors files \(only {name}\); save the model in this folder with save_pretrained",
    ):
        load_base(config(folder))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_beside_safetensors_are_not_read(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    torch.save(Planted(tmp_path / "ran"), folder / "pytorch_model.bin")
    assert load_base(config(folder)).fingerprint == load_base(config(tiny_base)).fingerprint
    assert not (tmp_path / "ran").exists()


def test_the_planted_file_would_run(tmp_path: Path) -> None:
    torch.save(Planted(tmp_path / "ran"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "ran").read_text() == "ran"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("left", [0, 100])
def test_damaged_bases_are_refused(tiny_base: Path, tmp_path: Path, name: str, left: int) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:left])
    with pytest.raises(ModelError, match="it cannot be loaded"):
        load_base(config(folder))


def test_a_folder_without_weights_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"must be safetensors files \(it has none\)"):
        load_base(config(tmp_path / "base"))


class Drawing(Observer):
    """Remembers when libraries draw."""

    def __init__(self) -> None:
        self.heard: list[bool] = []

    def libraries_draw(self, begin: bool) -> None:
        self.heard.append(begin)


@pytest.mark.parametrize(
    ("source", "terminal", "drawn"), [("org/name", True, True), ("org/name", False, False), (".", True, False)]
)
def test_libraries_draw_bars_on_a_terminal_for_a_base_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, source: str, terminal: bool, drawn: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with observing(observer := Drawing()):
        with _library_bars(source):
            assert transformers_logging.is_progress_bar_enabled() == drawn
            assert are_progress_bars_disabled() != drawn
            assert observer.heard == [True] * drawn
        assert observer.heard == [True, False] * drawn
    transformers_logging.disable_progress_bar()


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_too_little_memory_is_told_as_that(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ModelError, match=r"cpu has too little memory to load it.*quantization = 'nf4'"):
        load_base(config(tiny_base))
