"""Clients in Ray's actors: the results of one process, errors by name, resuming. Needs the extra: ``make ray``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexperts.config.run import RunConfig
from flexperts.engines import ray as engine
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError
from flexperts.observer import Observer

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

Recipe = Callable[..., RunConfig]
SHORT = ("evaluation.max_new_tokens=2", "evaluation.rows=2", "lora.dropout=0.1", "engine.threads=1")
ON_RAY = (*SHORT, "engine.kind=ray", "engine.workers=2")


class Told(Observer):
    """Remembers what a run tells. After a round it ends the run, or kills an actor."""

    def __init__(self, *, ends: bool = False) -> None:
        self.ends = ends
        self.chosen_by: set[str] = set()
        self.tasks: set[str] = set()

    def chosen(self, client: str, choice: Any) -> None:
        self.chosen_by.add(client)

    def progress(self, task: str, done: int, total: int) -> None:
        self.tasks.add(task)

    def round(self, record: Mapping[str, Any]) -> None:
        if self.ends:
            raise KeyboardInterrupt
        for actor in actors()[:1]:
            actor.kill()


class Damage(Observer):
    """Damages a file after round 1, and remembers the actors."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.actors: list[psutil.Process] = []

    def round(self, record: Mapping[str, Any]) -> None:
        self.actors = actors()
        self.file.write_bytes(b"damaged")


def actors() -> list[psutil.Process]:
    """Return the actors that this process has started."""
    return [p for p in psutil.Process().children(recursive=True) if "ClientAppActor" in "".join(p.cmdline())]


def results(folder: Path) -> dict[str, bytes]:
    """Return a run's tensors, its chosen experts, and its answers with their scores."""
    kept = [p for kind in ("*.safetensors", "predictions/*", "selection/*") for p in sorted(folder.rglob(kind))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_two_actors_give_the_bits_of_one_process_also_after_an_interruption(recipe: Recipe, tmp_path: Path) -> None:
    flex = "method.reference=fedavg"
    here = run_federation(recipe(*SHORT, flex), tmp_path / "here", told := Told())
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_federation(recipe(*ON_RAY, flex), tmp_path / "ray", ends := Told(ends=True))
    there = run_federation(recipe(*ON_RAY, flex), tmp_path / "ray", after := Told(), resume=True)
    assert results(tmp_path / "ray") == results(tmp_path / "here")
    assert (here["engine"]["workers"], there["engine"]) == (1, {"workers": 2, "threads": 1})
    assert there["peak_memory"]
    assert told.chosen_by == ends.chosen_by | after.chosen_by
    # Of a turn's states an actor sends a few per second, so a short one may not be told.
    assert told.tasks >= ends.tasks | after.tasks > {f"{name}: personalized answers" for name in told.chosen_by}
    assert signal.getsignal(signal.SIGTERM) is handler
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_an_error_in_a_client_is_the_one_of_one_process(recipe: Recipe, tmp_path: Path) -> None:
    said = {}
    for where, settings in {"here": SHORT, "ray": ON_RAY}.items():
        out = tmp_path / where
        damage = Damage(out / "personal" / "law_firm.safetensors")
        with pytest.raises(ArtifactError) as caught:
            run_federation(recipe(*settings), out, damage)
        said[where] = str(caught.value).replace(str(out), "")
        assert not list(out.glob(".*.part"))
    assert said["ray"] == said["here"]
    assert "law_firm" in said["ray"]
    assert len(damage.actors) == 2
    assert not psutil.wait_procs(damage.actors, timeout=20)[1]


def test_an_actor_without_the_run_directory_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_begun", (None, tmp_path, tmp_path / "elsewhere"), raising=False)
    with pytest.raises(ArtifactError, match="does not see this run directory"):
        engine._ready()
