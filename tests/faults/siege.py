"""Runs one recipe undisturbed, then again and again with kills until each run finishes; a script, one per recipe.

Every run is a process of its own, forked while nothing but the base is loaded: no thread has started.
Prints a JSON report: the places of the undisturbed run, every kill, and the files in which a killed run differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from fuse import Fuse, FuseObserver

from flexperts.client.workspace import Workspace
from flexperts.engines.run import run_federation
from flexperts.recipe import parse_recipe

MEASURES = ("seconds", "peak_memory", "sha256")
"""What two runs of one recipe differ in: wall times, memory, and the checksum over them."""


def without_measures(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_measures(v) for k, v in value.items() if k not in MEASURES}
    return value


def left_behind(folder: Path) -> dict[str, Any]:
    """Return every file of a run, whole but for wall times and the name that was drawn for it."""
    files: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "run_id"):
        content: Any = path.read_bytes()
        if path.name == "rounds.jsonl":
            content = [without_measures(json.loads(line)) for line in content.decode().splitlines()]
        elif path.name == "summary.json":
            content = without_measures(json.loads(content))
        files[str(path.relative_to(folder))] = content
    return files


def noted(descriptor: int, text: str) -> None:
    os.write(descriptor, text.encode())


def attempt(workspace: Workspace, out: Path, target: tuple[str, int] | None, notes: Path) -> int:
    """Run or resume in a new process that is killed at the given place, and return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    note = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    fuse = Fuse(target, out, lambda kind: noted(note, kind))
    status = 1
    try:
        fuse.install()
        run_federation(workspace.config, out, FuseObserver(fuse), resume=True, workspace=workspace)
        noted(note, json.dumps(fuse.passed))
        status = 0
    except Exception as error:
        noted(note, repr(error))
    finally:
        os._exit(status)


def besiege(workspace: Workspace, folder: Path, kills: int, stream: random.Random) -> dict[str, Any]:
    """Return the report of an undisturbed run and of as many killed ones as it takes for ``kills``."""
    notes = folder / "notes"
    assert attempt(workspace, folder / "straight", None, notes) == 0, notes.read_text()
    places, expected = json.loads(notes.read_text()), left_behind(folder / "straight")
    report: dict[str, Any] = {"places": places, "killed": [], "runs": 0, "files": sorted(expected), "differ": []}
    while len(report["killed"]) < kills:
        out = folder / f"run-{report['runs']}"
        report["runs"] += 1
        report["killed"] += until_it_finishes(workspace, out, places, notes, stream)
        found = left_behind(out)
        report["differ"] += [n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
    return report


def until_it_finishes(
    workspace: Workspace, out: Path, places: dict[str, int], notes: Path, stream: random.Random
) -> list[str]:
    """Kill and resume a run up to five times, then let it finish; return the kinds of the places of the kills."""
    killed: list[str] = []
    for more in (True, True, True, True, True, False):
        kind = stream.choice(sorted(places))
        status = attempt(workspace, out, (kind, stream.randrange(places[kind])) if more else None, notes)
        if status == 0:
            break
        assert status == signal.SIGKILL, f"{notes.read_text()} after kills at {killed}"
        killed.append(notes.read_text())
    return killed


def main() -> None:
    recipe, folder, kills, seed = sys.argv[1:]
    torch.set_num_threads(1)
    workspace = Workspace(parse_recipe(Path(recipe).read_text()))
    workspace.check(workspace.config, needs_experts=False)  # loads rows and base, once for all runs
    print(json.dumps(besiege(workspace, Path(folder), int(kills), random.Random(seed))))


if __name__ == "__main__":
    main()
