"""Runs of a comparison: every entry with every seed, in any number of processes; an interrupted one resumes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from flexperts.client.workspace import Workspace
from flexperts.engines.run import run_federation
from flexperts.errors import FlexpertsError
from flexperts.files import content_of, write_json, write_text
from flexperts.observer import Observer, Observers, Once
from flexperts.progress import Line, RunProgress
from flexperts.studies.claim import alone_in, claimed
from flexperts.studies.entries import ComparisonPlan, Entry
from flexperts.studies.finished import CLAIM, DONE, RUNS, SEED, folder_name
from flexperts.tracking import Tracking, tracker_classes

HEAVY = ("personal", "shared", "checkpoint.safetensors")
"""Files of a finished run with weights, which a comparison does not read."""

_LONGEST = 500
"""Most characters of a line that a worker sends."""
_BUSY = "another process runs it"
"""Returned for a job that another process is running."""
_NOTES = "notes.txt"
_AT_ONCE, _FOREVER = 0.0, -1.0
"""Timeouts of a lock: do not wait, or wait without limit. The locks of a process that dies are released."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        entry: The entry to run.
        seed: The run's seed.
        folder: The run directory.
    """

    entry: Entry
    seed: int
    folder: Path

    def __str__(self) -> str:
        """Return the entry's name and the seed."""
        return f"{self.entry.name}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether the run has finished, including the evaluation after the last round."""
        return (self.folder / DONE).exists()


OnDone = Callable[[Job, str | None], None]
"""Called with each job, and its error if it failed."""
OnProgress = Callable[[str, Line | None], None]
"""Called with a run's name and where it is; None when it has ended."""


def jobs(plan: ComparisonPlan, out: Path) -> list[Job]:
    """Return all runs, seed by seed, so that all entries can be compared after the first seed."""
    return [Job(e, s, out / RUNS / folder_name(e.name) / f"{SEED}{s}") for s in plan.seeds for e in plan.entries]


def run_comparison(
    plan: ComparisonPlan,
    out: Path,
    *,
    workers: int = 1,
    keep_weights: bool = False,
    track: Sequence[str] = (),
    observer: Observer | None = None,
    on_done: OnDone = lambda job, error: None,
    on_progress: OnProgress = lambda run, line: None,
) -> list[Job]:
    """Run all jobs that are not finished; return those that failed, with a traceback in their ``error.txt``.

    Several processes may share a directory: a job that another process is running is skipped, and awaited at the
    end.

    Args:
        plan: The comparison.
        out: The comparison's directory; an interrupted comparison resumes, and entries and seeds may be added.
        workers: Number of processes; each has a base in memory.
        keep_weights: Whether to keep every run's weights.
        track: Trackers that log every run, by accelerate's names.
        observer: Receives the progress of runs in this process (``workers`` = 1).
        on_done: Called after each job, with its error if it failed.
        on_progress: Called about every second for each run in another process (``workers`` > 1), by another thread.
    """
    tracker_classes(track)
    claimed(plan, out)  # refuse before anything is written
    with alone_in(out):
        write_json(out / CLAIM, claimed(plan, out))
    observer = Once(observer or Observer())  # runs of one recipe repeat many notices
    manner = _Manner(plan, keep_weights, tuple(track), observer if workers == 1 else Observer())
    run = partial(_run, manner)

    def ended(job: Job, error: str | None) -> None:
        for line in _notes_of(job):
            observer.notice(line)
        on_done(job, error)

    waiting = [job for job in jobs(plan, out) if not job.done]
    failed, busy = _sort_out(_run_all(partial(run, _AT_ONCE), waiting, workers, on_progress), ended)
    if busy:
        observer.stage(f"waiting for runs of another process: {', '.join(map(str, busy))}")
        failed += _sort_out(_run_all(partial(run, _FOREVER), busy, workers, on_progress), ended)[0]
    return failed


class _Notes(Observer):
    """Observer that writes notices to a file of the run, so that another process can report them.

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
    """The settings with which every job of a comparison is run."""

    plan: ComparisonPlan
    keep_weights: bool
    track: tuple[str, ...]
    observer: Observer


def _run_all(
    run: Callable[[Job], str | None], waiting: Sequence[Job], workers: int, on_progress: OnProgress
) -> Generator[tuple[Job, str | None]]:
    if workers == 1:
        try:
            yield from ((job, run(job)) for job in waiting)
        finally:
            _release()
        return
    # Each worker is a new interpreter: CUDA cannot be used in a forked one.
    fresh = multiprocessing.get_context("spawn")
    reader, writer = fresh.Pipe(duplex=False)
    with (
        reader,
        writer,
        _reading(reader, on_progress),
        ProcessPoolExecutor(workers, fresh, initializer=_set_up, initargs=(workers, writer)) as pool,
    ):
        try:
            started = {pool.submit(run, job): job for job in waiting}
            yield from ((started[future], _outcome(future)) for future in as_completed(started))
        except BaseException:  # such as Ctrl-C: the pool would wait for runs that take hours
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _sort_out(outcomes: Generator[tuple[Job, str | None]], on_done: OnDone) -> tuple[list[Job], list[Job]]:
    """Report the jobs as they end; return those that failed, and those that another process is running."""
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


@contextmanager
def _reading(reader: Connection, on_progress: OnProgress) -> Iterator[None]:
    """Pass on what workers tell of their runs inside the block."""
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            if reader.poll(0.2):
                name, *line = json.loads(reader.recv_bytes())
                on_progress(name, Line(*line) if line else None)

    thread = threading.Thread(target=read, name="flexperts progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _telling(job: Job) -> Iterator[Observer]:
    """Yield an observer; in a worker, where the run is, is sent to the parent process every second."""
    progress, ended, writer = RunProgress(), threading.Event(), _parent
    if writer is None:
        yield Observer()
        return

    def write(*line: Any) -> None:
        # This is shorter than PIPE_BUF, so messages of several processes arrive whole.
        writer.send_bytes(json.dumps([str(job), *line], ensure_ascii=False).encode(errors="replace"))

    def tell() -> None:
        with suppress(OSError):  # the parent process has ended
            while not ended.wait(1):
                for line in progress.lines()[:1]:
                    write(line.text[:_LONGEST], line.facts, line.done, line.total)
            write()

    thread = threading.Thread(target=tell, name="flexperts progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()


def _set_up(workers: int, writer: Connection) -> None:
    """Prepare a worker; ``writer`` is where it tells of its runs."""
    global _parent
    _parent = writer
    _share_cores(workers)


def _share_cores(workers: int) -> None:
    """Limit a worker to its share of the cores; otherwise each would use all, and they would slow each other down.

    Ctrl-C reaches all processes of a terminal, so workers ignore it, and the parent process ends them. Warnings are
    ignored as in the parent process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for kind in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", kind)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def _outcome(future: Future[str | None]) -> str | None:
    """Return a job's error; a killed process could not return one."""
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process was killed, probably for lack of memory: use fewer workers and start again"


_parent: Connection | None = None
"""In a worker: where it tells of its runs."""
_workspace: Workspace | None = None
"""Base and rows that the runs of one process share."""


def _release() -> None:
    """Free the base's memory, as the caller's process continues."""
    global _workspace
    _workspace = None


def _run(manner: _Manner, patience: float, job: Job) -> str | None:
    """Run one job, unless it is done, and return its error; ``_BUSY`` if another process holds its lock."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder.with_name(f"{job.folder.name}.lock"), timeout=patience)
    try:
        with lock:
            return None if job.done else _run_alone(manner, job)
    except Timeout:
        return _BUSY


def _run_alone(manner: _Manner, job: Job) -> str | None:
    """Run one job and return its error, so that a failed entry does not stop the others."""
    global _workspace
    try:
        config = manner.plan.config(job.entry, job.seed)
        _workspace = _workspace.for_run(config) if _workspace else Workspace(config)
        with Tracking(manner.track, config, job.folder, name=str(job)) as tracking, _telling(job) as telling:
            observer = Observers(manner.observer, tracking, telling, _Notes(job.folder / _NOTES))
            observer.run(str(job))
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
