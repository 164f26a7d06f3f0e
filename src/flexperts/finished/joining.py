"""Joining a silo after training: it prepares, and trains its personal part on the finished shared weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from flexperts.artifacts import JOINED, RunDirectory
from flexperts.client.answer_limit import check_limit, with_recorded_limit
from flexperts.client.client import Client
from flexperts.client.request import Request
from flexperts.client.workspace import Workspace
from flexperts.config.data import ClientFiles, DataConfig
from flexperts.config.names import alike, client_name, normal, readings_of
from flexperts.config.run import RunConfig
from flexperts.data.clients import partition_manifest
from flexperts.data.records import name_and_ending
from flexperts.data.sources import HUB
from flexperts.data.tables import given_source
from flexperts.errors import ArtifactError, ConfigError
from flexperts.evaluation.scores import Scores, kinds_in
from flexperts.files import make_folder, sealed, sole_writer, unwritable, write_json
from flexperts.finished.trained import TrainedRun, kept_data, left_out_rows, recipe_of, with_rows_of
from flexperts.methods.kit.method import Method, State
from flexperts.methods.registry import make_method
from flexperts.observer import Observer, observing
from flexperts.parameters.vector import vector_hash
from flexperts.recipe import client_files, located, recorded_recipe
from flexperts.seeding import seeded
from flexperts.server.checkpoint import load_server
from flexperts.server.summary import not_finite_of
from flexperts.training.local import LocalSettings, TrainResult

_READING = tuple(key for key in ClientFiles.model_fields if key in DataConfig.model_fields)
_OWN = (*(f"data.{key}" for key in _READING), "model.template")
"""Settings beside [training] that a new client may change; the others are fixed by the run's models."""
_COMMON = ("training.max_length", "training.gradient_checkpointing", "training.objective", "training.dpo_beta")


def join(
    path: Path | str,
    data: Any,
    *,
    test: Any = None,
    name: str | None = None,
    steps: int | None = None,
    columns: Mapping[str, str] | None = None,
    settings: Iterable[str] = (),
    seed: int | None = None,
    observer: Observer | None = None,
    workspace: Workspace | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Add a new client to a finished run: it prepares, trains its personal part alone, and is scored.

    Afterwards the run directory holds the client like any other. The shared weights, the summary and the other
    clients' files do not change, and the other clients' rows are not read. An interrupted join adds no client.

    Args:
        path: The directory of a finished run.
        data: The new client's rows: a file (.jsonl, .json, .csv, .tsv, .parquet), ``hub:org/name[:split]``, or rows
            in memory as for ``federate``; the run directory has no copy of these.
        test: Its test rows; without them, the run's share of its passages is held out.
        name: Its name; by default the file's name, or the folder's if the file is called ``train``.
        steps: Optimizer steps; by default as many as a participant with these rows has that trains in every round
            of the recipe, also where a share of clients trained in each.
        columns: Field -> column of its files, in place of the run's data.columns.
        settings: ``KEY=VALUE`` of [training] for this client, and how its rows are read: data.columns,
            data.on_bad_row, data.test_fraction, model.template.
        seed: Seed of its batches; by default the run's.
        observer: Receives progress.
        workspace: A workspace of the same base, in memory already.
        base: Folder of the run's base, if it is not where the recipe says.
        trust_remote_code: Whether code of the base may run; a recipe that asks for it is refused otherwise.

    Returns:
        The record that is also in ``joined/NAME.json``: rows (counts and hashes), steps, seed, loss, scores.

    Raises:
        FlexpertsError: The run has not finished or has such a client, its method keeps nothing personal, base or
            settings are not the run's, or the rows break a rule.
    """
    run = RunDirectory.open(Path(path))
    observer = observer or Observer()
    with sole_writer(run.path), observing(observer):
        trusted = trust_remote_code or workspace is not None
        config, summary = recipe_of(run, base, trusted=trusted), run.summary()
        method = make_method(config.method)
        _check_personal(method, summary)
        name = client_name(name or _name_of(data))
        _check_free(run, name)
        own_settings = _own_settings(run, settings, config.seed if seed is None else seed, steps)
        trains = with_recorded_limit(own_settings, summary)
        given: dict[str, Any] = {}
        tested = None if test is None else _located(name, "test", test, given)
        sides = {"train": _located(name, "train", data, given), "test": tested}
        files = client_files(f"{name}'s rows", _own_of_rows(trains, config, columns) | sides)
        rows_only = with_rows_of(config, name, files)
        observer.stage(f"{name}: reading rows")
        own = workspace.for_run(rows_only) if workspace else Workspace(rows_only)
        own.given = {**own.given, **given}
        rows = partition_manifest(own.clients)["clients"][name]  # read first: errors in rows need no base
        own.check(config, needs_experts=method.needs_experts)
        known = {"client": name, "data": kept_data(run.path, files), "rows": rows}
        return _admit(run, own, trains, steps, known, method.states, observer, base)


def join_left_out(
    path: Path, name: str, workspace: Workspace, observer: Observer | None = None
) -> dict[str, Any] | None:
    """Let a client that the recipe leaves out (``data.leave_out``) join the finished run, with the recipe's rows.

    This is ``join`` with all settings of the run, also for methods that keep nothing personal: there the client
    uses the global model as it is. A client that has joined already is not changed.

    Args:
        path: The directory of a finished run.
        name: The client's name.
        workspace: The run's workspace.
        observer: Receives progress.

    Returns:
        The record, as ``join``; steps are 0 and loss is None if nothing was trained. None, and a notice, if the
        method has no model for a client that took no part: where the server makes the clients' models.
    """
    run, name, observer = RunDirectory.open(path), normal(name), observer or Observer()
    if (record := run.joined().get(name)) is not None:
        return record
    with sole_writer(run.path), observing(observer):
        config, summary = recipe_of(run, trusted=True), run.summary()
        method = make_method(config.method)
        states = _states_of_newcomers(method, summary)
        if not states:
            rule = "the server makes a model for each participant, so a newcomer has none"
            observer.notice(f"{name} does not join: with {method.name}, {rule}")
            return None
        _check_free(run, name)
        if workspace.template_date == config.model.template_date:  # else prompts differ, and so does the workspace
            config = config.model_copy(update={"model": workspace.config.model})
        own = workspace.for_run(left_out_rows(run, config, name))
        own.check(config, needs_experts=method.needs_experts)
        known = {"client": name, "data": None, "rows": partition_manifest(own.clients)["clients"][name]}
        return _admit(run, own, with_recorded_limit(config, summary), None, known, states, observer)


def _states_of_newcomers(method: Method, summary: Mapping[str, Any]) -> tuple[State, ...]:
    """Return the states that a client has which took no part: without a personal part, those of a common model."""
    if summary["parameters"]["personal"]:
        return method.states
    common = tuple(state for state in method.states if state != "personalized")
    return common if method.one_global and ("global" in common or common == method.states) else ()


def _admit(
    run: RunDirectory,
    own: Workspace,
    trains: RunConfig,
    steps: int | None,
    known: Mapping[str, Any],
    states: Sequence[State],
    observer: Observer,
    base: str | None = None,
) -> dict[str, Any]:
    """Train and score a newcomer, move its files into the run, and return its record.

    Args:
        run: The finished run.
        own: The newcomer's rows, and the base.
        trains: The run with the newcomer's settings.
        steps: See ``Newcomer``.
        known: The record's first entries: client, data, rows.
        states: The newcomer's states; it trains only if one of them is personalized.
        observer: Receives progress.
        base: Folder of the run's base, if it is not where the recipe says.
    """
    name = known["client"]
    check_limit(own, trains, observer)
    with closing(TrainedRun(run.path, own, base=base)) as trained, _staging(run.path, name) as staging:
        newcomer = Newcomer(trains, steps, states, name, own, trained.model, staging, observer)
        record = {**known, **newcomer.onboard(trained.request(name))}
        _publish(staging, run.path)
        write_json(run.path / JOINED / f"{name}.json", sealed(record))  # last: this file makes it a client
    return record


class Newcomer(Client):
    """A client that joins after the last round.

    Args:
        config: The run with the new client's training settings and seed.
        steps: Optimizer steps; None = as many as a participant with its rows has that trains in every round.
        states: The states in which it has a model; it trains only if one of them is personalized.
        arguments: As ``Client``.
    """

    def __init__(self, config: RunConfig, steps: int | None, states: Sequence[State], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.config, self.steps, self.states = config, steps, states

    def onboard(self, request: Request) -> dict[str, Any]:
        """Train the client if it has a personalized state, let it choose, score it; return its record's entries."""
        result = None
        if "personalized" in self.states:
            self.observer.stage(f"{self.name}: {self.method.keeps}, on the shared weights of round {request.round}")
            result = self.personalize(request)
        self.observer.stage(f"{self.name}: evaluation")
        if result:
            self.settle(request)
        elif self._ends(request):
            self.choice(request)
        scores = self.evaluate(request, self.states)
        self.write_predictions(scores)
        self.test_candidates(request, scores)
        found = _scored(scores)
        for state, reason in found["not_finite"].items():
            self.observer.notice(f"{self.name}, {state}: no score; {reason}")
        return {
            "base": self.model.base.fingerprint,
            "shared": vector_hash(request.payload.vector),
            "training": self.config.training.model_dump(exclude_none=True),
            "seed": self.config.seed,
            "steps": result.steps if result else 0,
            "loss": result.loss if result else None,
            **found,
            **self._answers(scores),
        }

    def _answers(self, scores: Mapping[State, Scores]) -> dict[str, Any]:
        """Return a client's ``answers`` in the form of a summary."""
        told = self.answer_counts(scores)
        cut = {state: told.pop(f"cut.{state}") for state in scores}
        return {"answers": {**told, "cut": cut}}

    def personalize(self, request: Request) -> TrainResult:
        """Train the personal part without rounds and save it on disk; nothing is encoded for sending."""
        with self._training(request, 0) as (turn, meta), seeded(turn.stream.initial_seed()):
            # Dropout draws from the global stream.
            self.method.receive(turn)
            turn.moments = None  # no round follows in which they would be used
            result = self.method.personalize(turn)
            self._keep(turn, meta, vector_hash(request.payload.vector))
        return result

    @cached_property
    def alone(self) -> Client:
        """The same client, trained on its own rows alone, for as many steps at one time as its personal part.

        Without a personal part it is compared with the participants' model, and takes as many steps as they.
        """
        alone, steps = super().alone, self._local_settings(1).total_steps
        if "personalized" not in self.states:
            return alone
        training = alone.config.training.model_copy(update={"local_steps": steps, "local_seconds": None})
        federation = alone.config.federation.model_copy(update={"rounds": 1})
        alone.config = alone.config.model_copy(update={"training": training, "federation": federation})
        return alone

    def _candidates(self, request: Request) -> list[str]:
        """Return the models to compare; without a personal part, none that needs it."""
        names = super()._candidates(request)
        return [n for n in names if "personalized" in self.states or n in ("zero_shot", "global", "local")]

    def _local_settings(self, round_number: int) -> LocalSettings:
        """Return settings for one optimizer and one cosine over all steps: no averaging interrupts training."""
        steps = self.steps or super()._local_settings(round_number).total_steps
        return self._settings(steps, steps)


def _scored(scores: Mapping[State, Scores]) -> dict[str, Any]:
    """Return the scores in the form of a client's entry in a summary."""
    kinds = kinds_in(next(iter(scores.values())).metrics())
    by_kind = {kind: {state: getattr(its, kind) for state, its in scores.items()} for kind in kinds}
    return {**by_kind, "not_finite": not_finite_of(scores), "scored_rows": next(iter(scores.values())).rows}


def _check_personal(method: Method, summary: Mapping[str, Any]) -> None:
    """Refuse a run whose clients have trained nothing personal."""
    if not summary["parameters"]["personal"]:
        usable = "global" if "global" in method.states else "zero_shot"
        raise ConfigError(
            f"method {method.name!r}",
            "its clients train nothing personal, so a new client has nothing to train",
            f"use the run's {usable} model as it is, or start a new run with the new client among the clients",
        )


def _check_free(run: RunDirectory, name: str) -> None:
    """Refuse the name of a client that the run has or had: its files must not be overwritten."""
    summary = run.summary()
    taken = {*load_server(run.checkpoint).clients, *summary["clients"], *summary["unscored"], *run.joined()}
    file = run.path / "personal" / f"{name}.safetensors"
    # A personal file with a staging folder was left by a join that was killed.
    if name in taken or (file.exists() and not _staged(run.path, name).exists()):
        raise ArtifactError(f"client {name!r}", f"{run.path} has files of that name", "give another --name")
    if (other := alike(name, readings_of(taken))) is not None:
        raise ArtifactError(
            f"client {name!a}", f"the run has a client {other!a}, which looks alike", "give another --name"
        )


def _own_settings(run: RunDirectory, settings: Iterable[str], seed: int, steps: int | None) -> RunConfig:
    """Return the run's recipe with the new client's settings; refuse settings that it may not change."""
    given = list(settings)
    for override in given:
        key = override.partition("=")[0].strip()
        if not (key.startswith("training.") or key in _OWN or key.startswith("data.columns.")) or key in _COMMON:
            rule = f"a new client may set training.* (not {', '.join(_COMMON)}), {', '.join(_OWN)}"
            raise ConfigError(f"--set {override}", rule, "leave it out: the run's value is used")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps = {steps}", "it must be at least 1", "raise it or leave it out")
    return recorded_recipe(run.path, [*given, f"seed={seed}"])


def _own_of_rows(trains: RunConfig, config: RunConfig, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the new client's settings for its rows, where they are not those of ``with_rows_of``.

    Args:
        trains: The run's recipe with the new client's settings.
        config: The run's recipe.
        columns: See ``join``.
    """
    wanted = {key: getattr(trains.data, key) for key in _READING}
    wanted |= {} if columns is None else {"columns": dict(columns)}
    usual = with_rows_of(config, "_", ClientFiles(train="_")).data
    own = {key: value for key, value in wanted.items() if value != getattr(usual, key)}
    return own if trains.model.template == config.model.template else own | {"template": trains.model.template}


def _name_of(data: Any) -> str:
    if not isinstance(data, str | Path):
        raise ConfigError("name", "rows in memory have no file name to take it from", "give the client's name")
    path = Path(str(data).removeprefix(HUB))
    name = name_and_ending(path)[0]
    return Path(located(str(data), Path())).parent.name if name == "train" else name


def _located(client: str, side: str, rows: Any, given: dict[str, Any]) -> str:
    """Return the source of rows, and add those that are in memory to ``given``."""
    if isinstance(rows, str | Path):
        return located(str(rows), Path())
    given[source := given_source(client, side)] = rows
    return source


def _staged(run: Path, name: str) -> Path:
    return run / JOINED / f"{name}.part"


@contextmanager
def _staging(run: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder for the new client's files; it is removed afterwards, unless the process is killed."""
    folder = _staged(run, name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()  # if no client has joined


def _publish(staging: Path, run: Path) -> None:
    """Move the new client's files to the folders of the run's clients; earlier states are not needed."""
    moved: list[Path] = []
    for path in sorted(p for p in staging.rglob("*") if p.is_file() and p.parent.name != "before"):
        target = run / path.relative_to(staging)
        try:
            make_folder(target.parent)
            path.replace(target)
        except OSError as error:
            for other in moved:  # else they would block another attempt
                other.unlink(missing_ok=True)
            raise unwritable(target, error) from error
        moved.append(target)
