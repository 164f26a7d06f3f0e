"""Free memory is what the machine has available, or less where the control group sets a limit."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexperts.modeling import memory
from flexperts.modeling.memory import free_bytes

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8,000 kB available, and no control group."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "self")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    return tmp_path


def test_what_is_available_is_free(machine: Path) -> None:
    assert free_bytes(CPU) == 8000 * 1024


def test_a_control_groups_limit_counts_without_its_page_cache(machine: Path) -> None:
    (machine / "memory.max").write_text("5000000\n")
    (machine / "memory.current").write_text("3000000\n")
    (machine / "memory.stat").write_text("anon 2000000\nfile 1000000\n")
    assert free_bytes(CPU) == 3_000_000


def test_no_limit_is_no_limit(machine: Path) -> None:
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text("3000000\n")
    assert free_bytes(CPU) == 8000 * 1024


def test_other_systems_tell_something(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert free_bytes(CPU) > 0


FREED = """
import resource
from pathlib import Path
import torch
from flexperts.modeling.memory import freed_memory_kept

torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(5_000_000) for _ in range(4)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

with freed_memory_kept():
    for _ in range(3):  # the heap grows in the first ones
        with freed_memory_kept():
            faults()
    again, inside = faults(), resident()
print(again, inside - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_used_again_and_given_back_at_the_end() -> None:
    """In a process of its own: where other threads have used the heap, freed memory is in several places."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    again, given_back = map(int, done.stdout.split())
    assert again < 10_000  # 80 MB are 20,000 pages; where the heap lies differs, and one of four may be elsewhere
    assert given_back > 60_000_000
