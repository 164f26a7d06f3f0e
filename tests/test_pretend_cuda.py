"""A part of the tests on pretended cards, in a process of its own: torch looks for cards once, on its import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("pretend_cuda")
PART = "a_training_step and flex and not low and not place or dbrx or cudnns and True"


def test_cards_that_a_stand_in_pretends() -> None:
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "pretend_cuda",
        FOLDER,
        "-k",
        PART,
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "5 passed" in done.stdout or "skipped" in done.stdout
