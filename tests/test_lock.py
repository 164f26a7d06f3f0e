"""requirements.lock: the hashes of the versions in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


def versions(text: str) -> dict[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in PINNED.findall(text)}


def test_every_locked_file_has_a_hash_and_the_tested_version() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=\S)", lock, flags=re.MULTILINE)[1:]
    assert len(entries) == len(versions(lock)) > 100
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    tested, locked = versions((ROOT / "constraints.txt").read_text()), versions(lock)
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}


def test_it_has_everything_that_flexperts_needs() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert needed
    names = set(re.findall(r'^ *"([\w-]+)', needed[1], re.MULTILINE))
    assert len(names) > 10
    assert names <= versions((ROOT / "requirements.lock").read_text()).keys()
