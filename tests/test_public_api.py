"""The public API is the committed list: a name or signature that changes is seen in review."""

from __future__ import annotations

import runpy
from pathlib import Path

import flexperts

ROOT = Path(__file__).parents[1]


def test_the_committed_list_is_the_public_api() -> None:
    """After a change that is meant: ``python dev/public_api.py``, and a line in CHANGELOG.md."""
    made = runpy.run_path(str(ROOT / "dev" / "public_api.py"))["public_api"]()
    listed = (ROOT / "dev" / "public-api.txt").read_text(encoding="utf-8")
    assert made == listed
    assert all(f"\n{name}" in f"\n{listed}" for name in flexperts.__all__)
    assert "\ntesting.save_tiny_base(" in listed
