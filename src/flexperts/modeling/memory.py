"""Memory: the free bytes of this machine, and the peak of this process.

On CUDA both are the device's counts. On a Linux CPU, free memory is the smaller of what the system has available
and what this process's control group may still use; the peak is resident memory.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")
_GROUPS = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the two settings of mallopt."""
_LARGE, _KEPT = 2**25, 2**30
"""Bytes: tensors that still get pages of their own (the largest that glibc chooses by itself), and what is kept."""
_blocks = 0
"""Blocks of ``freed_memory_kept`` that this process is in."""


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate.

    Args:
        device: The computing device; a CPU means the machine's memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(_PROC.parent / "meminfo"), re.MULTILINE)
    free = 1024 * int(found[1]) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min([free, *_group_room()])


def _group_room() -> list[int]:
    """Return the free bytes of the control group, if it has a limit; its page cache counts as free."""
    most, used = _read(_GROUPS / "memory.max").strip(), _read(_GROUPS / "memory.current").strip()
    cached = re.search(r"^file (\d+)$", _read(_GROUPS / "memory.stat"), re.MULTILINE)
    if not (most.isdigit() and used.isdigit()):
        return []
    return [int(most) - int(used) + (int(cached[1]) if cached else 0)]


def _read(path: Path) -> str:
    """Return a file's text, or an empty text if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def reset_peak(device: torch.device) -> None:
    """Reset the peak, where the machine allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # Linux: resets the peak to the present resident memory


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak since the last ``reset_peak``, in bytes; None where it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    found = re.search(r"^VmHWM:\s+(\d+) kB", _read(_PROC / "status"), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep memory that tensors free for the next ones inside the block, and give it back at its end.

    Otherwise glibc gives a step's activations back to the system, and each step has to get them page by page. The
    peak does not change. Of nested blocks the outermost one gives back. Without glibc this does nothing.
    """
    global _blocks
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:
            library.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)  # as glibc relates the two
            library.malloc_trim(0)
