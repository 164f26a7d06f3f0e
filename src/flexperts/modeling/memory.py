"""Peak memory of this process: the device's own count on CUDA, resident memory on a Linux CPU."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

_PROC = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Start measuring afresh, where the machine allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # Linux: sets the peak back to what is resident now


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak since the last ``reset_peak``, in bytes; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", (_PROC / "status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
