"""The environment of a run: packages, code, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DEVICE = "FLEXPERTS_DEVICE"
"""Environment variable with the device of this process and those it starts; `--device` sets it."""
_PACKAGES = (
    "flexperts", "torch", "transformers", "peft", "accelerate", "flwr", "numpy", "safetensors", "rouge-score",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return package versions, the code's revision where it is a git checkout, and the machine."""
    import torch

    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "revision": _revision(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def together(found: Sequence[Any]) -> Any:
    """Return equally nested values as one; where values differ, a list of the different ones."""
    nested = [each for each in found if isinstance(each, Mapping)]
    if nested:
        keys = dict.fromkeys(key for each in nested for key in each)
        return {key: together([each.get(key) for each in nested]) for key in keys}
    distinct = list(dict.fromkeys(one for each in found for one in (each if isinstance(each, list) else [each])))
    return distinct[0] if len(distinct) == 1 else distinct


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _revision(checkout: Path) -> str | None:
    """Return a checkout's commit, with "-dirty" appended if files differ from it; None for an installed package.

    It is asked once: a process goes on with the code that it has loaded, whatever is committed meanwhile.
    """
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
