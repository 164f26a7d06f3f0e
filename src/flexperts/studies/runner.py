"""Running a comparison: every entry with every seed, in any number of processes, taken up where it broke off."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from flexperts.config.changes import recipe_changes
from flexperts.errors import ArtifactError, ConfigError, FlexpertsError
from flexperts.federation.observer import Observer
from flexperts.federation.run import run_federation
from flexperts.federation.workspace import Workspace
from flexperts.files import unwritable, write_json, write_text
from flexperts.studies.entries import Entry, Plan
from flexperts.studies.finished import CLAIM, DONE, RUNS, SEED, finished_marks, folder_name, read_claim

HEAVY = ("personal", "shared", "checkpoint.safetensors")
"""Weights of a finished run, which a comparison does not read."""


_BUSY = "another process runs it"
"""What is returned of a job that another process has in hand."""
_AT_ONCE, _FOREVER = 0.0, -1.0
"""Timeouts of a lock: not waited for, or without end; a process that dies lets go of its locks."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        entry: What is run.
        seed: With which seed.
        folder: Where.
    """

    entry: Entry
    seed: int
    folder: Path

    def __str__(self) -> str:
        """Return its entry and seed."""
        return f"{self.entry.name}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it has finished, with what lies beyond its rounds."""
        return (self.folder / DONE).exists()


OnDone = Callable[[Job, str | None], None]
"""Is told of each job, and of its error if it failed."""


def jobs(plan: Plan, out: Path) -> list[Job]:
    """Return all runs, seed by seed, so that what is finished early can be compared early."""
    return [Job(e, s, out / RUNS / folder_name(e.name) / f"{SEED}{s}") for s in plan.seeds for e in plan.entries]


def run_comparison(
    plan: Plan,
    out: Path,
    *,
    workers: int = 1,
    keep_weights: bool = False,
    observer: Observer | None = None,
    on_done: OnDone = lambda job, error: None,
) -> list[Job]:
    """Run what is not finished, and return the jobs that failed; ``error.txt`` in a job's folder says where.

    Several calls may share a directory: what another process runs is passed over and waited for at the end.

    Args:
        plan: The comparison.
        out: Its directory; one that holds a part of the comparison is continued, and may gain entries and seeds.
        workers: Processes; each holds a base in memory.
        keep_weights: Keep every run's weights.
        observer: Receives the progress of runs in this process (``workers`` = 1).
        on_done: Called after each job, with its error if it failed.

    Raises:
        ArtifactError: The directory holds another recipe's comparison.
        ConfigError: The reference is none of its entries.
    """
    _claim(plan, out)  # a refusal comes before anything is written
    with alone_in(out):
        write_json(out / CLAIM, _claim(plan, out))
    run = partial(_run, plan, keep_weights, observer if workers == 1 else None)
    waiting = [job for job in jobs(plan, out) if not job.done]
    failed, busy = _sort_out(_run_all(partial(run, _AT_ONCE), waiting, workers), on_done)
    if busy:
        if observer:
            observer.stage(f"waiting for what another process runs: {', '.join(map(str, busy))}")
        failed += _sort_out(_run_all(partial(run, _FOREVER), busy, workers), on_done)[0]
    return failed


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other processes that share a comparison's directory waiting, while a file of all of them is written.

    Raises:
        ArtifactError: The directory cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / f"{CLAIM}.lock")
        lock.acquire()
    except OSError as error:
        raise unwritable(out, error) from error
    try:
        yield
    finally:
        lock.release()


def _claim(plan: Plan, out: Path) -> dict[str, Any]:
    """Return what a directory is for, with what it holds already, or refuse one of another recipe."""
    path, compare = out / CLAIM, plan.base.compare
    claim: dict[str, Any] = {"recipe": plan.base.to_toml()}
    before = read_claim(out) if path.exists() else claim
    _check_same_recipe(before, claim, out)
    entries = _entries(plan, before.get("entries", {}), out)
    planned = [entry.name for entry in plan.entries]
    there = [name for name in entries if name in planned or finished_marks(out, name)]
    known = [name for name in (before.get("reference"), compare.reference) if name in there]
    reference = plan.reference or [*known, *planned][0]
    if reference not in there:
        raise ConfigError(f"reference {reference!r}", f"it is one of {', '.join(there)}", "add it to the entries")
    bootstrap = {"confidence": compare.confidence, "resamples": compare.resamples}
    return claim | {"entries": entries, "reference": reference, **bootstrap}


def _check_same_recipe(before: dict[str, Any], claim: dict[str, Any], out: Path) -> None:
    if before["recipe"] == claim["recipe"]:
        return
    changes = recipe_changes(before["recipe"], claim["recipe"])
    rule = f"it holds a comparison of another recipe ({changes})"
    raise ArtifactError(f"{out}", rule, "give the recipe and --set of the first start")


def _entries(plan: Plan, before: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return all entries of the directory, or refuse some that would take another's finished runs for their own."""
    new = {entry.name: list(entry.settings) for entry in plan.entries}
    entries = before | new
    places: dict[str, str] = {}
    for name in entries:
        started = any((out / RUNS / folder_name(name)).glob("*/config.toml"))
        if started and before.get(name, entries[name]) != entries[name]:
            changed = f"{out}: entry {name!r} with {entries[name]}"
            raise ArtifactError(changed, f"it was run with {before[name]}", "give the variant another name")
        if (other := places.setdefault(folder_name(name), name)) != name:
            raise ArtifactError(f"entries {other!r} and {name!r}", "their folders have one name", "rename one")
    return entries


def _run_all(
    run: Callable[[Job], str | None], waiting: Sequence[Job], workers: int
) -> Iterator[tuple[Job, str | None]]:
    if workers == 1:
        try:
            yield from ((job, run(job)) for job in waiting)
        finally:
            _release()
        return
    # A fresh interpreter for each worker: CUDA cannot be used in a forked one.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, initializer=_share_cores, initargs=(workers,)) as pool:
        started = {pool.submit(run, job): job for job in waiting}
        yield from ((started[future], _outcome(future)) for future in as_completed(started))


def _sort_out(outcomes: Iterable[tuple[Job, str | None]], on_done: OnDone) -> tuple[list[Job], list[Job]]:
    """Report the jobs as they end; return those that failed, and those that another process has in hand."""
    failed: list[Job] = []
    busy: list[Job] = []
    for job, error in outcomes:
        if error == _BUSY:
            busy.append(job)
            continue
        on_done(job, error)
        failed += [job] if error else []
    return failed, busy


def _share_cores(workers: int) -> None:
    """Leave each process its part of the cores; each would take all, and they would wait for each other."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def _outcome(future: Future[str | None]) -> str | None:
    """Return a job's error; one whose process was killed has written none."""
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process was killed, as for lack of memory: take fewer workers and start again"


_workspace: Workspace | None = None
"""What the runs of one process share, base and rows."""


def _release() -> None:
    """Give the base's memory back to a caller whose process goes on."""
    global _workspace
    _workspace = None


def _run(plan: Plan, keep_weights: bool, observer: Observer | None, patience: float, job: Job) -> str | None:
    """Run one job, unless another process did, and return what went wrong; ``_BUSY`` where its lock stays held."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder.with_name(f"{job.folder.name}.lock"), timeout=patience)
    try:
        with lock:
            return None if job.done else _run_alone(plan, job, keep_weights, observer)
    except Timeout:
        return _BUSY


def _run_alone(plan: Plan, job: Job, keep_weights: bool, observer: Observer | None) -> str | None:
    """Run one job and return what went wrong: one broken entry must not cost the others."""
    global _workspace
    try:
        config = plan.config(job.entry, job.seed)
        _workspace = _workspace.for_run(config) if _workspace else Workspace(config)
        run_federation(config, job.folder, observer, resume=True, workspace=_workspace)
    except Exception as error:
        write_text(job.folder / "error.txt", traceback.format_exc())
        return str(error) if isinstance(error, FlexpertsError) else repr(error)
    (job.folder / "error.txt").unlink(missing_ok=True)
    for name in () if keep_weights else HEAVY:
        path = job.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(job.folder / DONE, "")
    return None
