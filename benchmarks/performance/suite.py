"""Run every benchmark of the suite, one at a time, and write docs/performance.md.

    make bench                                                   # all; the page says how long that takes
    python benchmarks/performance/suite.py selection start_up    # some

Nothing else should run on the machine meanwhile. A script that fails does not stop the others; the exit code is
then not 0.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = (
    "start_up",
    "selection",
    "training_step",
    "round_overhead",
    "generation",
    "message_bytes",
    "scale",
    "rivals",
)
"""In the order in which they run and appear on the page."""


def main() -> None:
    """Run what was asked for, or all."""
    folder = Path(__file__).parent
    asked = sys.argv[1:] or list(SCRIPTS)
    if unknown := set(asked) - set(SCRIPTS):
        sys.exit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    failed = []
    for name in asked:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        if subprocess.run([sys.executable, str(folder / f"{name}.py")], check=False).returncode:
            failed.append(name)
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    subprocess.run([sys.executable, str(folder / "page.py")], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
