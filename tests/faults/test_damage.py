"""Files that were cut, changed or deleted, and a full disk: refused by name, or without effect on the result."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from siege import left_behind

from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, FlexpertsError
from flexperts.observer import Observer

pytestmark = pytest.mark.faults

Recipe = Callable[..., RunConfig]
SHORT = (
    "evaluation.max_new_tokens=2", "evaluation.rows=1", "evaluation.every=1", "evaluation.routing_rows=1",
    "federation.rounds=3", "federation.participation=0.5", "lora.dropout=0.1",
)  # fmt: skip
RANDOM_FLIPS, CUTS = 12, 4


class BrokenOffError(Exception):
    """What stands for a power cut."""


class InRound3(Observer):
    """Breaks the run off at the first step of round 3's second client."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def progress(self, task: str, done: int, total: int) -> None:
        if task.endswith("round 3"):
            self.seen.add(task)
            if len(self.seen) == 2:
                raise BrokenOffError


class Place:
    """A workspace, a run that was broken off in it, and what an undisturbed one leaves."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder, self.workspace = config, folder, Workspace(config)
        self.run(folder / "finished")
        with pytest.raises(BrokenOffError):
            self.run(folder / "broken", InRound3())

    def run(self, out: Path, observer: Observer | None = None) -> dict[str, Any]:
        return run_federation(self.config, out, observer, resume=True, workspace=self.workspace)


@pytest.fixture(scope="module")
def place(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(recipe(*SHORT), tmp_path_factory.mktemp("damage"))


def damages(whole: bytes, seed: str) -> Iterator[tuple[str, bytes | None]]:
    """Yield what is left of a file that was deleted, cut, or changed in one byte."""
    stream = random.Random(seed)
    yield "deleted", None
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {0, 1, 7, 8, 9, len(whole) - 1, *([header - 1, header] if header < len(whole) else [])}
    for length in sorted(
        {n for n in lengths if 0 <= n < len(whole)} | set(stream.choices(range(len(whole)), k=CUTS))
    ):
        yield f"cut to {length}", whole[:length]
    for place in stream.choices(range(len(whole)), k=RANDOM_FLIPS):
        byte = whole[place] ^ stream.randrange(1, 256)
        yield f"byte {place} is {byte}", whole[:place] + bytes([byte]) + whole[place + 1 :]


BROKEN = [
    "checkpoint.safetensors", "personal/clinic.safetensors", "personal/help_desk.safetensors",
    "personal/before/clinic.safetensors", "rounds.jsonl", "config.toml", "partition.json", "environment.json",
    "run_id", "selection/shop.json", "predictions/shop.jsonl", "routing/shop.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damage_to_a_broken_run_is_told_or_has_no_effect(place: Place, tmp_path: Path, name: str) -> None:
    expected = left_behind(place.folder / "finished")
    refused = same = 0
    for what, content in damages((place.folder / "broken" / name).read_bytes(), name):
        out = tmp_path / "out"
        shutil.copytree(place.folder / "broken", out)
        (out / name).unlink() if content is None else (out / name).write_bytes(content)
        before = left_behind_raw(out)
        try:
            place.run(out)
        except FlexpertsError as error:
            refused += 1
            check_refusal(error, out, name, deleted=content is None)
            kept = left_behind_raw(out)
            assert kept.get("checkpoint.safetensors") == before.get("checkpoint.safetensors"), what
            assert kept.get(name) == before.get(name), what
        else:
            same += 1
            found = left_behind(out)
            differ = [n for n in expected.keys() | found.keys() if found.get(n) != expected.get(n)]
            assert set(differ) <= {name}, (what, differ)
        shutil.rmtree(out)
    print(f"{name}: {refused} refused, {same} without effect")
    assert refused + same > RANDOM_FLIPS


def check_refusal(error: FlexpertsError, out: Path, name: str, *, deleted: bool) -> None:
    assert error.remedy
    assert (str(out) if deleted else Path(name).name) in str(error)


def left_behind_raw(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["summary.json", "config.toml"])
def test_damage_to_a_finished_run_is_told(place: Place, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(place.folder / "finished", out)
    whole = (out / name).read_bytes()
    summary = place.run(out)
    for what, content in damages(whole, name):
        if content is not None:
            (out / name).write_bytes(content)
            try:
                assert place.run(out) == summary, what
            except ArtifactError as error:
                check_refusal(error, out, name, deleted=False)
    (out / name).write_bytes(whole)
    assert place.run(out) == summary


FULL = """
import resource, sys
import flexperts.terminal.display, flexperts.engines.run, flexperts.tracking  # torch writes while it loads
from flexperts.cli.main import main
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
main()
"""


def command(place: Place, out: Path, limit: int) -> subprocess.CompletedProcess[str]:
    recipe = place.folder / "recipe.toml"
    recipe.write_text(place.config.to_toml())
    arguments = [sys.executable, "-c", FULL, str(limit), "run", str(recipe), "--out", str(out), "--resume"]
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, env=os.environ | {"NO_COLOR": "1"}
    )


@pytest.mark.parametrize("limit", [0, 100, "rounds", "personal", "checkpoint"])
def test_a_full_disk_is_one_line_and_loses_nothing(place: Place, tmp_path: Path, limit: Any) -> None:
    """A limit on the size of files stands for the full disk: writes beyond it fail with an error of the system."""
    sizes = {n: len(b) for n, b in left_behind_raw(place.folder / "finished").items()}
    limits = {
        "rounds": sizes["rounds.jsonl"] - 100,
        "personal": sizes["personal/shop.safetensors"] - 1,
        "checkpoint": sizes["checkpoint.safetensors"] - 1,
    }
    out = tmp_path / "out"
    shutil.copytree(place.folder / "broken", out)
    before = left_behind_raw(out)
    done = command(place, out, limits.get(limit, limit))
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert "it cannot be written" in line
    assert "free some space" in line
    kept = left_behind_raw(out)
    assert kept["checkpoint.safetensors"] == before["checkpoint.safetensors"]
    assert not [n for n in kept if n.endswith(".part")]
    place.run(out)
    assert left_behind(out) == left_behind(place.folder / "finished")
