"""Files that earlier versions, and this one, have written are read as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .record import HERE, found

VERSIONS = sorted(path.parent for path in HERE.glob("*/found.json"))


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_files_of_a_version_are_read_as_when_they_were_written(version: Path, tmp_path: Path) -> None:
    shutil.copytree(version, tmp_path / "copy")
    told = json.loads(json.dumps(found(tmp_path / "copy")))
    assert told == json.loads((version / "found.json").read_text())
    assert told["silo"][0][2] == told["personal"]["round"] == 1


def test_there_are_files_of_a_version() -> None:
    assert VERSIONS
