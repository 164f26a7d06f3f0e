"""Runs with worker processes leave what a run in one process leaves, bit for bit, also when workers are killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from own_method import Own

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.files import write_text
from flexperts.methods.registry import register_method
from flexperts.observer import Observer

Recipe = Callable[..., RunConfig]
ONE_THREAD = ("engine.threads=1", "training.local_steps=2", "evaluation.rows=2", "federation.rounds=2")
VARIANTS = {
    "flex": ("lora.dropout=0.1",),
    "fedavg": ("method.name=fedavg",),
    "scaffold": ("method.name=scaffold", "training.optimizer=sgd", "training.lr=0.05"),
    "fedsa_lora": ("method.name=fedsa_lora",),
    "fedalt": ("method.name=fedalt", "federation.participation=0.5"),
    "fedlease": ("method.name=fedlease", "method.options={warmup_rounds=1}", "federation.participation=0.5"),
    "compressed": ("compression.kind=int8",),
    "packed both ways": ("compression.kind=top_k_int4", "compression.downlink=int4", "evaluation.every=1"),
    "robust": ("federation.aggregation=median",),
}
MEASURES = ("seconds", "peak_memory", "sha256", "engine")


class Killer(Observer):
    """Kills a worker in its training once, and remembers the notices.

    Args:
        task: Start of the progress task in which it strikes.
    """

    def __init__(self, task: str) -> None:
        self.task, self.killed = task, 0
        self.notices: list[str] = []

    def progress(self, task: str, done: int, total: int) -> None:
        if task.startswith(self.task) and not self.killed:
            worker = random.Random(0).choice(workers())
            self.killed = worker.pid
            worker.kill()

    def notice(self, text: str) -> None:
        self.notices.append(text)


class StoppedError(Exception):
    """Stands for Ctrl-C."""


class AfterRound(Observer):
    def round(self, record: Mapping[str, Any]) -> None:
        raise StoppedError


def test_a_run_with_a_killed_worker_equals_one_without_workers(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*ONE_THREAD, "method.reference=fedavg", "evaluation.routing_rows=1")
    run_federation(config, tmp_path / "alone")
    killer = Killer("law_firm: round 1")
    summary = run_federation(with_workers(config, 2), tmp_path / "together", killer)
    assert killer.killed
    assert any("a new one repeats it" in text for text in killer.notices)
    assert summary["engine"] == {"workers": 2, "threads": 1}
    assert left_in(tmp_path / "together") == left_in(tmp_path / "alone")
    assert workers() == []


def test_workers_keep_moments_and_train_after_the_last_round(recipe: Recipe, tmp_path: Path) -> None:
    settings = ("training.personal_moments=kept", "method.options={finish=1}", "evaluation.max_new_tokens=1")
    config = recipe(*ONE_THREAD, *settings)
    run_federation(config, tmp_path / "alone")
    run_federation(with_workers(config, 2), tmp_path / "together")
    assert left_in(tmp_path / "together") == left_in(tmp_path / "alone")


def test_a_run_of_one_recipe_resumes_with_any_engine(recipe: Recipe) -> None:
    config = recipe(*ONE_THREAD)
    assert with_workers(config, 3).to_toml() == config.to_toml()


def test_auto_starts_no_more_workers_than_clients_or_threads(recipe: Recipe, tmp_path: Path) -> None:
    """The tests' process has one thread."""
    summary = run_federation(with_workers(recipe(*ONE_THREAD, "federation.rounds=1"), "auto"), tmp_path / "run")
    assert summary["engine"] == {"workers": 1, "threads": 1}


@pytest.mark.usefixtures("own_registry")
def test_workers_know_methods_that_this_process_has_registered(recipe: Recipe, tmp_path: Path) -> None:
    class Hidden(Own):
        name = "hidden"

    register_method("own", Own)
    register_method("hidden", Hidden)
    short = (*ONE_THREAD, "federation.rounds=1")
    own, hidden = recipe(*short, "method.name=own"), recipe(*short, "method.name=hidden")
    run_federation(own, tmp_path / "alone")
    run_federation(with_workers(own, 2), tmp_path / "together")
    assert left_in(tmp_path / "together") == left_in(tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"'hidden' at .* worker processes need it in a module"):
        run_federation(with_workers(hidden, 2), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_workers_are_refused_where_the_base_is_divided(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"engine.workers = 2 in one of 2 processes.*set engine.workers = 1"):
        run_federation(with_workers(recipe(*ONE_THREAD), 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.parametrize("name", VARIANTS)
def test_any_number_of_workers_gives_the_same_bits(recipe: Recipe, tmp_path: Path, name: str) -> None:
    config = recipe(*ONE_THREAD, *VARIANTS[name])
    run_federation(config, tmp_path / "1")
    run_federation(with_workers(config, 2), tmp_path / "2", Killer(""))
    with pytest.raises(StoppedError):
        run_federation(with_workers(config, 3), tmp_path / "resumed", AfterRound())
    assert workers() == []
    run_federation(with_workers(config, 2), tmp_path / "resumed", resume=True)
    expected = left_in(tmp_path / "1")
    assert len(expected) > 10
    for other in ("2", "resumed"):
        assert left_in(tmp_path / other) == expected


@pytest.mark.faults
def test_killed_parents_leave_no_process_and_their_run_resumes(recipe: Recipe, tmp_path: Path) -> None:
    config = with_workers(recipe(*ONE_THREAD, "federation.rounds=4"), 2)
    run_federation(config, tmp_path / "straight")
    command = "import sys; from flexperts.cli.main import main; main()"
    file = tmp_path / "recipe.toml"
    write_text(file, config.to_toml() + "\n[engine]\nworkers = 2\nthreads = 1\n")
    stream, out, kills, started = random.Random(0), tmp_path / "killed", 0, 0
    while not (out / "summary.json").exists():
        started += 1
        arguments = ["run", str(file), "--out", str(out), *(["--resume"] if out.exists() else [])]
        with subprocess.Popen([sys.executable, "-c", command, *arguments], start_new_session=True) as run:
            below: list[psutil.Process] = []
            if started <= 4:  # the fifth one ends the run
                with_patience(lambda run=run: run.poll() is not None or len(descendants(run.pid)) >= 3)
                time.sleep(stream.uniform(0, 4))
                below = descendants(run.pid)
                run.kill()
            kills += run.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(below, timeout=20)
        assert alive == []
    assert kills >= 1
    assert left_in(out) == left_in(tmp_path / "straight")


def with_patience(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def descendants(process: int) -> list[psutil.Process]:
    return psutil.Process(process).children(recursive=True) if psutil.pid_exists(process) else []


def workers() -> list[psutil.Process]:
    """Return this process's workers: the children of its fork servers."""
    return [worker for server in psutil.Process().children() for worker in server.children()]


def with_workers(config: RunConfig, workers: int | str) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"workers": workers})})


def left_in(folder: Path) -> dict[str, Any]:
    """Return every file of a run, without wall times, memory and the id that is drawn for it."""
    files: dict[str, Any] = {}
    for path in sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name not in ("run_id", "environment.json")
    ):
        content: Any = path.read_bytes()
        if path.suffix == ".jsonl" and path.name == "rounds.jsonl":
            content = [without_measures(json.loads(line)) for line in content.splitlines()]
        elif path.name == "summary.json":
            content = without_measures(json.loads(content))
        files[str(path.relative_to(folder))] = content
    return files


def without_measures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_measures(inner) for key, inner in value.items() if key not in MEASURES}
    return value
