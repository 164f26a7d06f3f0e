"""Bases are data: pickled weights are refused, and a base's own code runs only where the recipe trusts it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from flexperts.config.model import ModelConfig
from flexperts.errors import ModelError
from flexperts.modeling.load import load_base

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
    with pytest.raises(ModelError, match=r"own to run; set model.trust_remote_code = true") as caught:
        load_base(config(tmp_path / "base"))
    assert str(tmp_path / "base") in str(caught.value)
    assert not marker.exists()


def test_trust_runs_it(tiny_base: Path, tmp_path: Path) -> None:
    marker = planted(tiny_base, tmp_path / "base", "own_moe")
    loaded = load_base(config(tmp_path / "base", trust_remote_code=True))
    assert marker.read_text() == "ran"
    assert type(loaded.model).__name__ == "OwnModel"


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
    with pytest.raises(ModelError, match=rf"as safetensors \(only {name}\); save it there with save_pretrained"):
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
    with pytest.raises(ModelError, match=r"as safetensors \(it holds none\)"):
        load_base(config(tmp_path / "base"))
