"""Files that earlier versions, and this one, have written are read as they were, and their runs go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .record import HERE, continued, found, prepare

VERSIONS = sorted(path.parent for path in HERE.glob("*/found.json"))


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_files_of_a_version_are_read_as_when_they_were_written(version: Path, tmp_path: Path) -> None:
    shutil.copytree(version, tmp_path / "copy")
    told = json.loads(json.dumps(found(tmp_path / "copy")))
    assert told == json.loads((version / "found.json").read_text())
    assert told["silo"][0][2] == told["personal"]["round"] == 1


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_run_and_a_silo_of_a_version_go_on_as_that_version_did(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version itself went on, with this code, on a machine where this version's weights have the same bits."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    for name in ("run", "state"):
        shutil.copytree(version / name, name)
    for path in (Path("state"), *Path("state").rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    told, wanted = continued(), load_file(version / "continued.safetensors")
    assert told.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            told[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_there_are_files_of_a_version() -> None:
    assert VERSIONS
