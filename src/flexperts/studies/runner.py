"""Running a comparison: every entry with every seed, in any number of processes, taken up where it broke off."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from flexperts.client.workspace import Workspace
from flexperts.engines.in_process import run_federation
from flexperts.errors import FlexpertsError
from flexperts.files import content_of, write_json, write_text
from flexperts.observer import Observer, Observers, Once
from flexperts.studies.claim import alone_in, claimed
from flexperts.studies.entries import Entry, Plan
from flexperts.studies.finished import CLAIM, DONE, RUNS, SEED, folder_name
from flexperts.tracking import Tracking, tracker_classes

HEAVY = ("personal", "shared", "checkpoint.safetensors")
"""Weights of a finished run, which a comparison does not read."""

_BUSY = "another process runs it"
"""What is returned of a job that another process has in hand."""
_NOTES = "notes.txt"
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
    track: Sequence[str] = (),
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
        track: Trackers that log every run, as accelerate calls them.
        observer: Receives the progress of runs in this process (``workers`` = 1).
        on_done: Called after each job, with its error if it failed.
    """
    tracker_classes(track)
    claimed(plan, out)  # a refusal comes before anything is written
    with alone_in(out):
        write_json(out / CLAIM, claimed(plan, out))
    observer = Once(observer or Observer())  # runs of one recipe have much in common
    manner = _Manner(plan, keep_weights, tuple(track), observer if workers == 1 else Observer())
    run = partial(_run, manner)

    def ended(job: Job, error: str | None) -> None:
        for line in _notes_of(job):
            observer.notice(line)
        on_done(job, error)

    waiting = [job for job in jobs(plan, out) if not job.done]
    failed, busy = _sort_out(_run_all(partial(run, _AT_ONCE), waiting, workers), ended)
    if busy:
        observer.stage(f"waiting for what another process runs: {', '.join(map(str, busy))}")
        failed += _sort_out(_run_all(partial(run, _FOREVER), busy, workers), ended)[0]
    return failed


class _Notes(Observer):
    """Keeps what surprises beside the run, as another process may have to tell it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts: list[str] = []

    def notice(self, text: str) -> None:
        self._texts.append(text)
        write_text(self._path, "".join(f"{text}\n" for text in self._texts))


def _notes_of(job: Job) -> list[str]:
    path = job.folder / _NOTES
    return content_of(path).decode().splitlines() if path.exists() else []


@dataclass(frozen=True)
class _Manner:
    """How every job of a comparison is run."""

    plan: Plan
    keep_weights: bool
    track: tuple[str, ...]
    observer: Observer


def _run_all(
    run: Callable[[Job], str | None], waiting: Sequence[Job], workers: int
) -> Generator[tuple[Job, str | None]]:
    if workers == 1:
        try:
            yield from ((job, run(job)) for job in waiting)
        finally:
            _release()
        return
    # A fresh interpreter for each worker: CUDA cannot be used in a forked one.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, initializer=_share_cores, initargs=(workers,)) as pool:
        try:
            started = {pool.submit(run, job): job for job in waiting}
            yield from ((started[future], _outcome(future)) for future in as_completed(started))
        except BaseException:  # such as Ctrl-C: the pool would wait for runs that take hours
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _sort_out(outcomes: Generator[tuple[Job, str | None]], on_done: OnDone) -> tuple[list[Job], list[Job]]:
    """Report the jobs as they end; return those that failed, and those that another process has in hand."""
    failed: list[Job] = []
    busy: list[Job] = []
    with closing(outcomes):
        for job, error in outcomes:
            if error == _BUSY:
                busy.append(job)
                continue
            on_done(job, error)
            failed += [job] if error else []
    return failed, busy


def _share_cores(workers: int) -> None:
    """Leave each process its part of the cores; each would take all, and they would wait for each other.

    Ctrl-C reaches all processes of a terminal; the first one ends the others. Warnings are passed over as there.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for kind in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", kind)
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


def _run(manner: _Manner, patience: float, job: Job) -> str | None:
    """Run one job, unless another process did, and return what went wrong; ``_BUSY`` where its lock stays held."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder.with_name(f"{job.folder.name}.lock"), timeout=patience)
    try:
        with lock:
            return None if job.done else _run_alone(manner, job)
    except Timeout:
        return _BUSY


def _run_alone(manner: _Manner, job: Job) -> str | None:
    """Run one job and return what went wrong: one broken entry must not cost the others."""
    global _workspace
    try:
        config = manner.plan.config(job.entry, job.seed)
        _workspace = _workspace.for_run(config) if _workspace else Workspace(config)
        with Tracking(manner.track, config, job.folder, name=str(job)) as tracking:
            observer = Observers(manner.observer, tracking, _Notes(job.folder / _NOTES))
            run_federation(config, job.folder, observer, resume=True, workspace=_workspace)
    except Exception as error:
        write_text(job.folder / "error.txt", traceback.format_exc())
        return str(error) if isinstance(error, FlexpertsError) else repr(error)
    (job.folder / "error.txt").unlink(missing_ok=True)
    for name in () if manner.keep_weights else HEAVY:
        path = job.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(job.folder / DONE, "")
    return None
