"""Runs of a comparison: every entry with every seed, in any number of processes; an interrupted one resumes."""

from __future__ import annotations

import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from flexperts.client.floor import check_floor
from flexperts.client.workspace import Workspace
from flexperts.config.names import normal
from flexperts.config.run import EngineConfig
from flexperts.data.clients import load_clients
from flexperts.engines.pool import Call, pool_for
from flexperts.engines.run import run_federation
from flexperts.errors import FederationError, FlexpertsError
from flexperts.files import content_of, write_json, write_text
from flexperts.finished.joining import join_left_out
from flexperts.observer import Observer, Observers, Once, Relay, current_observer, observing
from flexperts.progress import RunProgress
from flexperts.studies.claim import alone_in, claimed, continued
from flexperts.studies.entries import ComparisonPlan, Entry
from flexperts.studies.finished import CLAIM, DONE, RUNS, SEED, folder_name
from flexperts.studies.scored import check_scored_rows
from flexperts.tracking import Tracking, tracker_classes

HEAVY = ("personal", "shared", "checkpoint.safetensors")
"""Files of a finished run with weights, which a comparison does not read."""

_BUSY = "another process runs it"
"""Returned for a job that another process is running."""
_NOTES = "notes.txt"
_PAUSE = 1.0
"""Seconds between two reports of where a run in a worker is."""
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
) -> list[Job]:
    """Run all jobs that are not finished; return those that failed, with a traceback in their ``error.txt``.

    Several processes may share a directory: a job that another process is running is skipped, and awaited at the
    end.

    Args:
        plan: The comparison.
        out: The comparison's directory; an interrupted comparison resumes, and entries and seeds may be added.
        workers: Runs at the same time, in as many processes with one copy of the base. With 1, every run has the
            workers that its recipe says.
        keep_weights: Whether to keep every run's weights.
        track: Trackers that log every run, by accelerate's names.
        observer: Receives stages and notices; with ``workers`` = 1 the progress of runs, else only where each is.
        on_done: Called after each job, with its error if it failed.
    """
    tracker_classes(track)
    plan = continued(plan, out)
    claim = claimed(plan, out)
    _check_newcomers(plan)
    check_scored_rows(plan, claim, out)  # all is refused before anything is written
    with alone_in(out):
        if (joint := claimed(plan, out)) != claim:  # another process has begun meanwhile
            check_scored_rows(plan, joint, out)
        write_json(out / CLAIM, joint)
    observer = Once(observer or Observer())  # runs of one recipe repeat many notices
    manner = _Manner(plan, keep_weights, tuple(track), workers > 1, observer if workers == 1 else Observer())

    def ended(job: Job, error: str | None) -> None:
        for line in _noted(job.folder / _NOTES):
            observer.notice(line)
        on_done(job, error)

    waiting = [job for job in jobs(plan, out) if not job.done]
    with observing(observer):
        failed, busy = _sort_out(_run_all(manner, _AT_ONCE, waiting, workers, out), ended)
        if busy:
            observer.stage(f"waiting for runs of another process: {', '.join(map(str, busy))}")
            failed += _sort_out(_run_all(manner, _FOREVER, busy, workers, out), ended)[0]
    return failed


def _check_newcomers(plan: ComparisonPlan) -> None:
    """Refuse newcomers that the data does not have or whose rows do not fit an entry, before any run is trained."""
    base, workspace = plan.base, None
    joining = {*map(normal, base.compare.newcomers)}
    if not joining:
        return
    others = {*load_clients(base.data, base.seed), *map(normal, base.data.leave_out or ())} - joining
    for seed in plan.seeds:
        for entry in plan.entries:
            config = plan.config(entry, seed)
            data = config.data.model_copy(update={"leave_out": tuple(sorted(others))})
            config = config.model_copy(update={"data": data})
            workspace = workspace.for_run(config) if workspace else Workspace(config)
            check_floor(config, workspace.clients)


class _Notes(Observer):
    """Observer that writes notices to a file of the run, so that another process can report them.

    Args:
        path: The file; notices of a start that was interrupted stay in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts = _noted(path)

    def notice(self, text: str) -> None:
        if text not in self._texts:  # what every start says
            self._texts.append(text)
            write_text(self._path, "".join(f"{text}\n" for text in self._texts))


def _noted(path: Path) -> list[str]:
    return content_of(path).decode().splitlines() if path.exists() else []


@dataclass(frozen=True)
class _Manner:
    """The settings with which every job of a comparison is run."""

    plan: ComparisonPlan
    keep_weights: bool
    track: tuple[str, ...]
    side_by_side: bool
    observer: Observer


def _run_all(
    manner: _Manner, patience: float, waiting: Sequence[Job], workers: int, out: Path
) -> Generator[tuple[Job, str | None]]:
    """Yield each job with its error; with several workers, in the order of the jobs as well."""
    if workers == 1:
        try:
            yield from ((job, _run(None, manner, patience, job)) for job in waiting)
        finally:
            _release()
        return
    if not waiting:
        return
    first = manner.plan.config(waiting[0].entry, waiting[0].seed)
    engine = first.engine.model_copy(update={"workers": workers})
    pool = pool_for(Workspace(first), engine, len(waiting), out)
    assert pool is not None
    left = deque(waiting)
    with pool:
        while left:
            try:
                for error in pool.results(Call(str(job), _run, (manner, patience, job)) for job in tuple(left)):
                    current_observer().follow(str(left[0]), None)
                    yield left.popleft(), error
            except FederationError as error:  # a job whose workers die must not stop the others
                yield left.popleft(), str(error)


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


def _followed(job: Job) -> Observer:
    """Return an observer in a worker, which tells the parent process about every second where the run is."""
    progress, parent, due = RunProgress(), current_observer(), 0.0

    def tell(event: str, *arguments: Any) -> None:
        nonlocal due
        getattr(progress, event)(*arguments)
        if (now := time.monotonic()) >= due:
            due = now + _PAUSE
            for line in progress.lines()[:1]:
                parent.follow(str(job), astuple(line))

    return Relay(tell)


_workspace: Workspace | None = None
"""Base and rows that the runs of one process share."""


def _release() -> None:
    """Free the base's memory, as the caller's process continues."""
    global _workspace
    _workspace = None


def _run(workspace: Workspace | None, manner: _Manner, patience: float, job: Job) -> str | None:
    """Run one job, unless it is done, and return its error; ``_BUSY`` if another process holds its lock.

    Args:
        workspace: In a worker, what it was forked with.
        manner: How jobs are run.
        patience: Seconds to wait for another process that runs the job.
        job: The job.
    """
    global _workspace
    _workspace = _workspace or workspace
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
        if manner.side_by_side:
            config = config.model_copy(update={"engine": EngineConfig(threads=torch.get_num_threads())})
        _workspace = _workspace.for_run(config) if _workspace else Workspace(config)
        with Tracking(manner.track, config, job.folder, name=str(job)) as tracking:
            seen = _followed(job) if manner.side_by_side else manner.observer
            observer = Observers(seen, tracking, _Notes(job.folder / _NOTES))
            observer.run(str(job))
            run_federation(config, job.folder, observer, resume=True, workspace=_workspace)
            for name in config.compare.newcomers:
                join_left_out(job.folder, name, _workspace, observer)
    except Exception as error:
        write_text(job.folder / "error.txt", traceback.format_exc())
        return str(error) if isinstance(error, FlexpertsError) else repr(error)
    (job.folder / "error.txt").unlink(missing_ok=True)
    for name in () if manner.keep_weights else HEAVY:
        path = job.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(job.folder / DONE, "")
    return None
