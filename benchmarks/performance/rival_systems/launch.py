"""Run one system in a fresh process, and watch how much memory it and its workers hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

_FOLDER = Path(__file__).parent
_INTERVAL = 0.5
"""Seconds; a sample takes some milliseconds of one core."""
_LONGEST = 900
"""Seconds that a system may take."""


def run_system(name: str, folder: Path, clients: int, rounds: int, out: Path, ray: Path) -> dict[str, Any]:
    """Run a system; return its report, with the most ``memory`` that its processes held at once, in bytes.

    Args:
        name: One of ``run_one.SYSTEMS``.
        folder: Where the clients' rows are.
        clients, rounds: How many of each.
        out: Its averaged adapter goes to this path, with the ending ``.safetensors``.
        ray: Where Ray is installed; only the system that needs it gets to see it.
    """
    environment = os.environ | ({"PYTHONPATH": str(ray)} if name == "ray" else {})
    command = [_FOLDER / "run_one.py", name, folder, clients, rounds, out]
    with out.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        watch = MemoryWatch(process.pid)
        watch.start()
        try:
            code = process.wait(_LONGEST)
        except subprocess.TimeoutExpired:  # a simulation that fails keeps waiting for its clients
            code = -1
            for below in psutil.Process(process.pid).children(recursive=True):
                below.kill()
            process.kill()
        watch.join()
    if code:
        sys.exit(f"{name} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
    told: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return told | {"memory": watch.peak}


class MemoryWatch(threading.Thread):
    """Samples the memory of a process and all below it until they have ended.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak = psutil.Process(pid), 0
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample; pages that processes share count once."""
        while not self._ended.wait(_INTERVAL):
            try:
                processes = [self.process, *self.process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(_proportional, processes)))

    def join(self, timeout: float | None = None) -> None:
        """Stop sampling."""
        self._ended.set()
        super().join(timeout)


def _proportional(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
