"""A whole run by one call: models for clients whose rows are in memory or in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.names import client_names
from flexperts.config.run import RunConfig
from flexperts.data.records import names_shown
from flexperts.data.tables import given_source
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, DataError
from flexperts.library.run import Run
from flexperts.observer import Observer, Observers
from flexperts.recipe import check_extras, recipe_of_tree, recorded_recipe
from flexperts.terminal.console import console
from flexperts.terminal.display import RunDisplay
from flexperts.terminal.preflight import check_memory

_WHERE = "flexperts.federate"


def federate(
    model: str | Path | Mapping[str, Any],
    clients: Mapping[str, Any] | str | Path,
    method: str | Mapping[str, Any] = "flex",
    rounds: int | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    keep_rows: bool = False,
    callbacks: Sequence[Observer] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a personal model for every client, all on this machine, and return the finished run.

    It is what `flexperts run` does with a recipe. Rows that are given from Python stay in memory: the run directory
    has their counts and hashes, and the texts of scored rows with their answers in ``predictions/``.

    Args:
        model: The base: a shipped base's name, a folder or a hub id; or all of a recipe's section [model].
        clients: Client -> its rows: a ``datasets.Dataset``, a table of pandas, polars or Arrow, a list of mappings,
            a file's path or ``hub:org/name``; or ``{"train": ..., "test": ...}`` of these. Without test rows some
            passages are held out. A path is a folder with one sub-folder per client.
        method: The method's name, or all of the section [method].
        rounds: Number of rounds; by default the recipe's.
        out: The run directory; by default a new one in ``runs``.
        resume: Resume the run in ``out`` after its last finished round. The same rows must be given again; their
            hashes are compared.
        keep_rows: Keep rows that are given from Python in ``out/rows``, as private files, so that
            `flexperts run OUT/config.toml --out OUT --resume` and `flexperts evaluate OUT` find them.
        callbacks: Receive the run's events.
        progress: Whether to show progress and a table of scores, in a terminal or a notebook.
        settings: Sections of a recipe, such as ``training={"lr": 1e-3}``, and ``seed``; `data` takes all but the
            source of rows.

    Raises:
        FlexpertsError: A setting, the rows or the base break a rule, or ``out`` holds another run.
    """
    config, given = _recipe(model, clients, method, rounds, settings)
    path = Path(out) if out is not None else Path("runs") / f"{config.method.name}-{datetime.now():%Y%m%d-%H%M%S}"
    check_extras(config)
    if resume and out is None:
        raise ConfigError("resume=True", "it needs the directory of the run to resume", "add out=...")
    if not resume:
        RunDirectory.check_free(path, config.to_toml(), "resume=True")
    if strange := [its for its in callbacks if not isinstance(its, Observer)]:
        rule = "callbacks are objects of flexperts.Callback or flexperts.Observer"
        raise ConfigError(
            f"callbacks: {type(strange[0]).__name__}", rule, "derive its class from flexperts.Callback"
        )
    with ExitStack() as stack:
        display = stack.enter_context(RunDisplay()) if progress else None
        config = check_memory(config, given, console=console(quiet=not progress))
        observers = Observers(*([display] if display else []), *callbacks)
        workspace = Workspace(config, given=given)
        summary = run_federation(config, path, observers, resume=resume, workspace=workspace, keep_rows=keep_rows)
    if display:
        display.result(summary, path)
    recorded = recorded_recipe(path)
    if workspace.encoder.date != recorded.model.template_date:  # the run began on another day
        workspace = Workspace(recorded, given=given)
    return Run(path, workspace)


def _recipe(
    model: str | Path | Mapping[str, Any],
    clients: Mapping[str, Any] | str | Path,
    method: str | Mapping[str, Any],
    rounds: int | None,
    settings: Mapping[str, Any],
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the recipe, and the rows that are in memory by their source in it."""
    tree: dict[str, Any] = _plain(settings)
    tree["model"] = _section(model, "base", "model")
    tree["method"] = _section(method, "name", "method")
    if rounds is not None:
        federation = _section(tree.get("federation", {}), "", "federation")
        if "rounds" in federation:
            raise ConfigError("rounds and federation['rounds']", "they are one setting", "give one of them")
        tree["federation"] = federation | {"rounds": rounds}
    data, given = _section(tree.get("data", {}), "", "data"), dict[str, Any]()
    if isinstance(clients, str | Path):
        data["folder"] = str(clients)
    elif isinstance(clients, Mapping) and clients:
        names = client_names(map(str, clients))
        data["clients"] = {names[str(n)]: _files(names[str(n)], rows, given) for n, rows in clients.items()}
    else:
        raise DataError("clients", "they are a mapping from each name to its rows", "name at least one client")
    return recipe_of_tree(tree | {"data": data}, folder=Path(), where=_WHERE), given


def _section(value: Any, main: str, name: str) -> dict[str, Any]:
    """Return a section's settings; a text or path is its main setting."""
    if isinstance(value, Mapping):
        plain: dict[str, Any] = _plain(value)
        return plain
    if main and isinstance(value, str | Path):
        return {main: str(value)}
    rule = f"it is {'a text, or ' if main else ''}the settings of the recipe's section as a mapping"
    raise ConfigError(f"{name}: {type(value).__name__}", rule, f"write {name}={{...}}; see docs/settings.md")


def _files(client: str, rows: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return a client's section of the recipe, and add rows in memory to ``given``."""
    section = dict(rows) if isinstance(rows, Mapping) else {"train": rows}
    if "train" not in section:
        raise DataError(
            f"{client}: a mapping with the keys {names_shown(map(str, section)) or 'none'}",
            "a client has train rows and may have test rows",
            'give {"train": ..., "test": ...}, each a data set, a table, a list of mappings or a path',
        )
    for side in ("train", "test"):
        if not isinstance(section.get(side), str | Path | None):
            source = given_source(client, side)
            given[source], section[side] = section[side], source
    found: dict[str, Any] = _plain({key: value for key, value in section.items() if value is not None})
    return found


def _plain(value: Any) -> Any:
    """Return settings with every path as text, and every mapping as a dictionary."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
