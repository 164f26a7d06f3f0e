"""Scoring a finished run's models again, on the run's rows or on others: one call per client, in any engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.client.answer_limit import answer_limit, check_limit, with_recorded_limit
from flexperts.client.workspace import Workspace
from flexperts.config.run import EngineConfig
from flexperts.data.rows import Row
from flexperts.data.tables import kept_given
from flexperts.data.unchanged import check_same_rows
from flexperts.engines.pool import Call, pool_for
from flexperts.errors import ModelError
from flexperts.evaluation.scores import Scores
from flexperts.finished.elsewhere import rows_elsewhere, said
from flexperts.finished.trained import TrainedRun, elsewhere, recipe_of
from flexperts.methods.kit.method import State
from flexperts.observer import current_observer


@dataclass(frozen=True)
class Scored:
    """Scores of a finished run.

    Args:
        scores: Client -> model state -> its scores.
        marks: Client -> what is special about it: it joined later, or its rows are not the run's.
        limit: The longest answer in tokens.
    """

    scores: Mapping[str, Mapping[State, Scores]]
    marks: Mapping[str, str]
    limit: int


def score_run(
    path: Path,
    data: Sequence[str] = (),
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    engine: EngineConfig,
) -> Scored:
    """Score the clients of a finished run in every state of its method.

    Args:
        path: The run directory.
        data: Other rows; see ``rows_elsewhere``. By default, every client's rows that the run itself has scored.
        base: Folder of the base, if it is not where the recipe says.
        trust_remote_code: See ``TrainedRun``.
        engine: Where the clients are scored.

    Raises:
        FlexpertsError: See ``TrainedRun``, ``rows_elsewhere`` and ``TrainedRun.own_rows``.
    """
    run = RunDirectory.open(path)
    config = with_recorded_limit(recipe_of(run, base, trusted=trust_remote_code), run.summary())
    workspace = Workspace(config, started_with=partial(check_same_rows, run.partition), given=kept_given(run.path))
    pool = pool_for(workspace, engine, len(run.summary()["clients"]), path)
    with pool or nullcontext():
        results = pool.results if pool else partial(_here, workspace)
        try:
            [plan] = results([Call("the rows", _plan, (path, base, tuple(data)))])
        except ModelError as error:
            raise (elsewhere(error) if pool else error) from error
        current_observer().stage(f"scoring {len(plan.rows)} clients")
        found = results(Call(name, _score, (path, base, name, rows)) for name, rows in sorted(plan.rows.items()))
        return Scored(dict(zip(sorted(plan.rows), found, strict=True)), plan.marks, plan.limit)


@dataclass(frozen=True)
class _Plan:
    rows: Mapping[str, Sequence[Row]]
    marks: Mapping[str, str]
    limit: int


def _here(workspace: Workspace, calls: Iterable[Call]) -> Iterator[Any]:
    return (call.function(workspace, *call.arguments) for call in calls)


def _plan(workspace: Workspace, path: Path, base: str | None, data: Sequence[str]) -> _Plan:
    """Find the rows that are scored."""
    run, observer = _trained(workspace, path, base), current_observer()
    marks = dict.fromkeys(run.joined, " (joined)")
    if data:
        given = rows_elsewhere(run, data)
        for line in said(given):
            observer.notice(line)
        marks |= {n: f"{marks.get(n, '')} (other rows)" for n, its in given.items() if not its.own}
        rows: Mapping[str, Sequence[Row]] = {name: its.rows for name, its in given.items()}
    else:
        rows = run.own_rows()
        check_limit(run.workspace, run.config, observer)
    return _Plan(rows, marks, answer_limit(run.workspace, run.config))


def _score(workspace: Workspace, path: Path, base: str | None, name: str, rows: Sequence[Row]) -> Any:
    """Score one client."""
    return _trained(workspace, path, base).evaluate(current_observer(), {name: rows})[name]


_run: TrainedRun | None = None
"""The run that this process scores."""


def _trained(workspace: Workspace, path: Path, base: str | None) -> TrainedRun:
    global _run
    if _run is None or _run.workspace is not workspace:
        _run = TrainedRun(path, workspace, base=base)
    return _run
