"""What a run was run by can be told afterwards."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from flexperts import environment as module
from flexperts.environment import environment, together


def test_versions_and_machine() -> None:
    found = environment()
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1


def test_a_checkout_tells_its_commit_and_that_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    code = tmp_path / "src" / "flexperts" / "environment.py"
    code.parent.mkdir(parents=True)
    code.write_text("before")
    monkeypatch.setattr(module, "__file__", str(code))

    def revision() -> str | None:
        module._revision.cache_clear()
        return environment()["revision"]

    assert revision() is None  # as an installed package
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert re.fullmatch("[0-9a-f]{10}", revision())
    code.write_text("after")
    assert re.fullmatch("[0-9a-f]{10}", environment()["revision"])  # the code that this process has loaded
    assert re.fullmatch("[0-9a-f]{10}-dirty", revision())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision() is None  # no git here
    module._revision.cache_clear()


def test_what_runs_do_not_have_in_common_stands_side_by_side() -> None:
    first, second = {"a": {"b": 1}, "c": [2, 3]}, {"a": None, "c": 3, "new": 4}
    assert together([first, second]) == {"a": {"b": 1}, "c": [2, 3], "new": [None, 4]}
    assert together([second, first])["a"] == {"b": 1}
    assert together([first, first]) == first
