"""The main path, from a recipe to a finished run directory.

recipe -> rows and base -> clients join and select -> rounds -> scores -> summary

Clients take their turns on an engine: in this process, in worker processes, or in Ray's actors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flexperts.artifacts import RunDirectory
from flexperts.client.answer_limit import check_limit
from flexperts.client.workspace import Workspace
from flexperts.config.names import normal
from flexperts.config.run import RunConfig
from flexperts.data.check import short_line
from flexperts.data.clients import Clients, partition_manifest
from flexperts.data.tables import keep_given, kept_given
from flexperts.data.unchanged import check_same_rows
from flexperts.engines.engine import Engine
from flexperts.engines.in_process import InProcess
from flexperts.engines.pool import pool_for
from flexperts.engines.ray import actors_for
from flexperts.engines.workers import Workers
from flexperts.errors import ArtifactError, ConfigError, did_you_mean, shown
from flexperts.files import LOCK, sole_writer, write_json
from flexperts.finished.beyond import check_beyond, is_wanted, look_beyond
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.observer import Observer, current_observer, observing
from flexperts.parameters.store import PersonalStore
from flexperts.protection.pipeline import check_enough, checked_method
from flexperts.recipe import check_extras, recorded_recipe
from flexperts.server.checkpoint import load_server
from flexperts.server.extending import extend, is_extended
from flexperts.server.serve import serve

_NAMED = 10
"""Most clients whose numbers of rows are shown one by one."""


def run_federation(
    config: RunConfig,
    out: Path | str,
    observer: Observer | None = None,
    *,
    resume: bool = False,
    workspace: Workspace | None = None,
    keep_rows: bool = False,
) -> dict[str, Any]:
    """Run a recipe with all clients on this machine.

    Args:
        config: The run.
        out: The run directory to create; it may only hold a run with ``resume``.
        observer: Receives progress; none by default.
        resume: Resume the run in ``out`` after its last finished round; ``config`` must be that run's recipe,
            except for the number of rounds (see ``extending``).
        workspace: Base and rows that are loaded already, for a recipe with the same seed, model, data, evaluation
            and longest example; many runs can share one.
        keep_rows: Keep rows that a Python program has given in ``out/rows``, so that a resumed run finds them.

    Returns:
        The summary, which is also in ``out/summary.json``; a reference method's summary is under ``reference``.

    Raises:
        FlexpertsError: Recipe, data or base break a rule, a resumed run has other rows than before, or another
            process writes the directory; these are checked before anything is written.
    """
    out = Path(out)
    if (out / "config.toml").exists():
        config = config.as_begun(recorded_recipe(out))
    if (summary := _standing(config, out, resume=resume)) is not None:
        _tidy(out)
        return summary
    with sole_writer(out), observing(observer or Observer()):
        summary = _standing(config, out, resume=resume)  # another process may just have ended
        workspace = (workspace or Workspace(config, given=kept_given(out))).for_run(config)
        return _run(config, out, workspace, keep_rows=keep_rows) if summary is None else summary


def _run(config: RunConfig, out: Path, workspace: Workspace, *, keep_rows: bool) -> dict[str, Any]:
    """Run what is not finished yet, in a directory that only this process writes."""
    started, run = time.monotonic(), RunDirectory(out)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # Flower logs many lines every round
    current_observer().stage(f"everything goes to {out}")
    _check(config, run, workspace)
    with engine_of(workspace, config, out) as engine:
        base = _prepare(config, engine)
        if keep_rows:
            keep_given(workspace.given, config.data, out)
        config = config.with_choices(template_date=workspace.template_date)
        loading = time.monotonic() - started
        summary = _run_method(engine, base, config, out, loading)
        if config.method.reference:
            reference = config.with_method(config.method.reference)
            summary["reference"] = _run_method(engine, base, reference, run.reference)
            run.write_summary(summary)
    return summary


def _standing(config: RunConfig, out: Path, *, resume: bool) -> dict[str, Any] | None:
    """Return the summary of the run in ``out`` if it is finished, else None; refuse a run of another recipe."""
    if not (resume and (out / "config.toml").exists()):
        RunDirectory.check_free(out, config.to_toml())
        return None
    if _is_extended(config, out):
        return None
    run = RunDirectory.create_or_resume(out, config.to_toml())
    if not run.has_finished:
        return None
    summary = run.summary(checked=True)
    looked = run.beyond.exists() or not is_wanted(config)
    return summary if looked and ("reference" in summary or not config.method.reference) else None


def _tidy(out: Path) -> None:
    """Remove temporary files of a process that was killed at the end of a run."""
    if (out / LOCK).exists():
        with suppress(ArtifactError), sole_writer(out):  # another process may have it, or it is read-only
            pass


def _is_extended(config: RunConfig, out: Path) -> bool:
    """Return whether the recipe changes the number of rounds of its run or the reference's; refuse invalid ones."""
    runs = [(RunDirectory(out), config)]
    if config.method.reference:
        runs.append((RunDirectory(RunDirectory(out).reference), config.with_method(config.method.reference)))
    extended = [is_extended(run, its) for run, its in runs if (run.path / "config.toml").exists()]
    return any(extended)


def engine_of(workspace: Workspace, config: RunConfig, folder: Path) -> Engine:
    """Return the engine that a recipe asks for.

    Args:
        workspace: The rows, and the base if it is in memory.
        config: The run.
        folder: An existing folder on a disk.
    """
    start = actors_for if config.engine.kind == "ray" else pool_for
    pool = start(workspace.rows_only(), config.engine, config.federation.drawn(len(workspace.clients)), folder)
    if pool is None:
        return InProcess(workspace, config.engine.threads or torch.get_num_threads())
    return Workers(workspace, pool)


def _check(config: RunConfig, run: RunDirectory, workspace: Workspace) -> None:
    """Read the rows, and check all that can be checked without the base."""
    observer = current_observer()
    check_settings(config)
    if config.model.device != "auto":
        observer.notice("model.device is deprecated: use --device or FLEXPERTS_DEVICE instead, until 0.3")
    observer.stage("reading rows")
    check_beyond(config)
    check_clients(config, workspace.clients)
    observer.stage(_rows_line(workspace.clients))
    observer.stage(short_line(workspace.clients, workspace.lengths, config.training.max_length))
    if (run.path / "config.toml").exists():
        check_same_rows(run.partition, workspace.clients)


def check_settings(config: RunConfig) -> None:
    """Refuse settings that do not fit each other, or need what is not installed; no rows are read."""
    check_extras(config)
    for its in _configs(config):
        checked_method(its)


def check_clients(config: RunConfig, clients: Clients) -> None:
    """Refuse clients whose number or rows do not fit the methods and defences, and names that no client has."""
    known = {*clients, *map(normal, config.data.leave_out or ())}
    named = [("federation.step_seconds", name) for name in config.federation.step_seconds]
    for its in _configs(config):
        method = make_method(its.method)
        method.check_clients(clients)
        named += [("method.options", name) for name in method.named_clients()]
    check_enough(config, len(clients))
    for section, name in named:
        if name not in known:
            remedy = did_you_mean(name, known, f"name one of {', '.join(sorted(known)[:_NAMED])}")
            raise ConfigError(f"{section}: {shown(name)}", "the data has no such client", remedy)


def _rows_line(clients: Clients) -> str:
    """Return the number of rows of every client, or the range where there are many."""
    sides = [side for side in ("train", "validation", "test") if any(getattr(r, side) for r in clients.values())]
    counts = [[len(getattr(rows, side)) for side in sides] for rows in clients.values()]
    if len(counts) <= _NAMED:
        each = (f"{name} {'/'.join(map(str, its))}" for name, its in zip(clients, counts, strict=True))
        return f"rows ({'/'.join(sides)}): {', '.join(each)}"
    ranges = (f"{min(its)} to {max(its)}" for its in zip(*counts, strict=True))
    return f"rows ({'/'.join(sides)}) of {len(counts)} clients: {' / '.join(ranges)}"


def _prepare(config: RunConfig, engine: Engine) -> str:
    """Load the base, check what needs it, and return its fingerprint."""
    observer = current_observer()
    routed = bool(config.evaluation.routing_rows)
    methods = [make_method(its.method) for its in _configs(config)]
    base = engine.prepare(config, needs_experts=routed or any(method.needs_experts for method in methods))
    check_limit(engine.workspace, config, observer)
    return base


def _configs(config: RunConfig) -> list[RunConfig]:
    """Return the run, and its reference's if the recipe names one."""
    return [config, *([config.with_method(config.method.reference)] if config.method.reference else [])]


def _run_method(engine: Engine, base: str, config: RunConfig, out: Path, loading: float = 0.0) -> dict[str, Any]:
    """Run one method, measure it beyond the clients' rows if the recipe says so, and return its summary.

    Steps that were finished before the run was resumed are skipped.

    Args:
        engine: Where clients take their turns.
        base: The base's fingerprint.
        config: The run.
        out: The run directory.
        loading: Seconds to load rows and base; they count as the run's.
    """
    run = RunDirectory(out)
    if (out / "config.toml").exists() and is_extended(run, config):
        extend(run, config, current_observer())
    if not run.has_finished:
        _run_rounds(engine, base, config, run, loading)
    if is_wanted(config) and not run.beyond.exists():
        current_observer().stage(f"{config.method.name}: other clients' rows and general tasks")
        trained = TrainedRun(out, engine.workspace)
        try:
            write_json(run.beyond, look_beyond(trained, current_observer()))
        finally:
            trained.close()
    return run.summary()


def _run_rounds(engine: Engine, base: str, config: RunConfig, run: RunDirectory, loading: float) -> None:
    """Serve a method's rounds to the engine's clients, and write the summary."""
    workspace = engine.workspace
    if run.checkpoint.exists():
        # On one machine the clients never change.
        _check_states(run, load_server(run.checkpoint, workspace.clients), base)

    def amend(summary: dict[str, Any]) -> dict[str, Any]:
        took = {
            name: round(value + loading * (name in ("setup", "total")), 2)
            for name, value in summary["seconds"].items()
        }
        floor = {"floor": _kept(run, summary["clients"])} if config.floor else {}
        return summary | {"seconds": took, "peak_memory": engine.peak, "engine": engine.facts} | floor

    with engine.grid(config, run) as grid:
        if not (run.path / "config.toml").exists():  # a resumed run keeps its first file
            write_json(run.partition, partition_manifest(workspace.clients))
        RunDirectory.create_or_resume(run.path, config.to_toml()).note_environment()
        serve(grid, config, run, current_observer(), amend)


def _kept(run: RunDirectory, clients: Iterable[str]) -> dict[str, Any]:
    """Return what every scored client keeps, and the loss of its candidates by kind of rows."""
    records = {name: run.of_client("floor", name) for name in clients}
    return {
        name: {"chosen": its["chosen"]}
        | {rows: its[rows].get("dpo") or its[rows]["nll"] for rows in ("validation", "test")}
        for name, its in records.items()
    }


def _check_states(run: RunDirectory, server: Server, base: str) -> None:
    """Refuse a client's state that is older than its last round, such as after the newest file was deleted.

    A client whose update was refused has a newer state than the server's records say; it keeps that state.
    """
    trained = {
        name: log["number"] - log.get("late", {}).get(name, 0)
        for log in run.finished_rounds(server.round)
        for name in log["clients"]
    }
    for name, last in sorted(trained.items()):
        store = PersonalStore(run.path / "personal" / f"{name}.safetensors", base)
        state = store.load(server.round)
        if state is None or state[1].round < last:
            found = "missing" if state is None else f"of round {state[1].round}"
            raise ArtifactError(
                f"the newest state of {name} in {store.path.parent} is {found}",
                f"{name} last trained in round {last}",
                "restore it from a copy, or start a new run",
            )
