"""Puts ``backend.cpp`` into this process, before torch: it looks for a card's code once, on its import."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("backend.cpp")
TORCH = Path(str(find_spec("torch").origin)).parent  # type: ignore[union-attr]
missing = ""
"""What this machine lacks for the stand-in; empty where it is loaded."""


def load() -> None:
    """Load the library, compiled where that was not done yet for this build of torch."""
    global missing
    compiler = shutil.which("c++")
    if compiler is None or (TORCH / "lib" / "libtorch_cuda.so").exists() or not sys.platform.startswith("linux"):
        missing = "needs Linux, torch's build for CPUs, and a C++ compiler"
        return
    made = SOURCE.parents[2] / "build" / "pretend_cuda" / f"{version('torch')}-{SOURCE.stat().st_mtime_ns}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        includes = [f"-I{TORCH / 'include' / below}" for below in ("", "torch/csrc/api/include")]
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        options = ["-std=c++20", "-shared", "-fPIC", "-o", str(unfinished)]
        subprocess.run([compiler, *includes, str(SOURCE), *libraries, *options], check=True)
        unfinished.replace(made)
    for name in ("libtorch_global_deps", "libc10", "libtorch_cpu"):
        ctypes.CDLL(str(TORCH / "lib" / f"{name}.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
