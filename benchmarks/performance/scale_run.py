"""One size of the scale benchmark, in a separate process: runs of one round over N silos, reported as JSON.

Every run starts afresh on rows and base that are loaded, so that all its participants select, train, and keep a
state for the first time: what a round costs when it meets new silos, at every size.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.observer import Observer

EVALUATED = 10


class Stopwatch(Observer):
    """Records when stages begin and rounds end, and the most files that were open at any event."""

    def __init__(self) -> None:
        self.moments: list[tuple[str, float]] = []
        self.files = 0

    def stage(self, text: str) -> None:
        """Note a stage by its text."""
        self._note(text)

    def round(self, record: Mapping[str, Any]) -> None:
        """Note the end of a round."""
        self._note("end of round")

    def progress(self, task: str, done: int, total: int) -> None:
        """Count open files."""
        self.files = max(self.files, len(list(Path("/proc/self/fd").iterdir())))

    def _note(self, text: str) -> None:
        self.moments.append((text, time.perf_counter()))
        self.progress(text, 0, 0)

    def between(self, first: str, last: str) -> float:
        """Return the seconds from the stage that starts with one text to that of another."""
        times = {start: time for start in (first, last) for text, time in self.moments if text.startswith(start)}
        return times[last] - times[first]


def main() -> None:
    """Run one size; the command line holds the size as JSON, the last line of the output the measures."""
    size = json.loads(sys.argv[1])
    folder = Path(size["folder"])
    config = _config(size)
    workspace = Workspace(config)
    reading = _seconds(lambda: workspace.clients)
    _ = workspace.base
    encoding = _seconds(lambda: workspace.check(config, needs_experts=True))
    runs = [_run(config, workspace, folder / f"run-{number}") for number in range(size["runs"])]
    found = {
        "reading": reading,
        "encoding": encoding,
        "runs": runs[1:],  # the first one warms up
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "personal_files": len(list((folder / "run-1" / "personal").glob("*.safetensors"))),
        "checkpoint_bytes": (folder / "run-1" / "checkpoint.safetensors").stat().st_size,
    }
    print(json.dumps(found))


def _run(config: RunConfig, workspace: Workspace, out: Path) -> dict[str, float]:
    watch = Stopwatch()
    summary = run_federation(config, out, watch, workspace=workspace)
    evaluation = summary["seconds"]["evaluation"]
    return {
        "joining": watch.between("flex: clients join", "round 1"),
        "round": watch.between("round 1", "end of round") - evaluation,
        "evaluation": evaluation,
        "open_files": watch.files,
    }


def _config(size: Mapping[str, Any]) -> RunConfig:
    """Return FLEx as it is, on two steps of four short rows."""
    return RunConfig.model_validate(
        {
            "model": {"base": size["base"]},
            "data": size["data"],
            "training": {"local_steps": 2, "batch_size": 4, "max_length": 256},
            "federation": {"rounds": 1, "participation": size["participants"] / size["silos"]},
            "evaluation": {"clients": EVALUATED, "rows": 1, "max_new_tokens": 1},
        }
    )


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
