"""Rows to score a finished run on that do not lie where its recipe says, and whether they are the run's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexperts.client.workspace import Workspace
from flexperts.config.data import ClientFiles, DataConfig
from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, rows_hash
from flexperts.data.rows import ClientRows, Row
from flexperts.data.sources import HUB, read_source
from flexperts.data.unchanged import has_rows, read_manifest
from flexperts.errors import ConfigError, DataError
from flexperts.finished.trained import TrainedRun, with_rows_of
from flexperts.observer import current_observer
from flexperts.recipe import located


@dataclass(frozen=True)
class Elsewhere:
    """One client's rows from another place.

    Args:
        rows: What is scored.
        own: Whether they are, by their hash, the rows that the run keeps for scoring this client.
    """

    rows: tuple[Row, ...]
    own: bool


def rows_elsewhere(run: TrainedRun, given: Sequence[str]) -> dict[str, Elsewhere]:
    """Return the rows that were asked for, by client.

    Args:
        run: The finished run.
        given: Each is ``NAME=SOURCE``, one client's rows (a file or ``hub:org/name``), or a folder: where the files
            of the recipe lie now, or one with a sub-folder per client.

    Raises:
        ConfigError: A client is none of the run's, or comes twice.
        DataError: Rows are not there or break a rule, or a client was trained on them.
    """
    found: dict[str, Elsewhere] = {}
    for one in given:
        name, equals, source = one.partition("=")
        parts = {name: _of_source(run, name, source)} if equals else _of_folder(run, Path(one))
        if twice := sorted(found.keys() & parts.keys()):
            raise ConfigError(f"--data {one}", f"{twice[0]} has rows already", "give a client's rows once")
        found |= parts
    return found


def _of_source(run: TrainedRun, name: str, source: str) -> Elsewhere:
    """Return one client's rows of a file: the held-out share if it is the run's own file, else all of them."""
    if name not in run.clients:
        raise ConfigError(f"--data {name}=...", f"the run's clients are {', '.join(run.clients)}", "name one")
    source = located(source, Path())
    data, joined = run.config.data, run.joined.get(name, {}).get("data")
    columns = joined["columns"] if joined else data.columns
    on_bad_row = joined.get("on_bad_row", "refuse") if joined else data.on_bad_row
    say = current_observer().notice
    whole = tuple(read_source(source, columns, split="test", on_bad_row=on_bad_row, say=say))
    if _is_own(run, name, whole):
        return _scored(run, name, whole, own=True)
    try:
        rows_only = with_rows_of(run.config, name, ClientFiles(train=source), columns, on_bad_row)
        held_out = _side(run.config, _clients(run, rows_only)[name])
    except DataError:  # too few passages to hold any out, as in a file of test rows
        held_out = ()
    if _is_own(run, name, held_out):
        return _scored(run, name, held_out, own=True)
    if has_rows(_entries(run).get(name, {}), "train", rows_hash(ClientRows(whole, ()))):
        raise DataError(source, f"{name} was trained on these rows", "give rows that it was not trained on")
    return _scored(run, name, whole, own=False)


def _clients(run: TrainedRun, config: RunConfig) -> Clients:
    """Return rows as a run has them that starts with them."""
    return Workspace(config, run.workspace.base, run.workspace.untouched).clients


def _of_folder(run: TrainedRun, folder: Path) -> dict[str, Elsewhere]:
    """Return all clients' rows that a folder holds."""
    if not folder.is_dir():
        rule = "rows are given as NAME=FILE, or as a folder"
        raise ConfigError(f"--data {folder}", rule, "correct the path, or write which client the file is of")
    clients = _clients(run, run.config.model_copy(update={"data": _moved(run.config.data, folder.resolve())}))
    names = sorted(clients.keys() & set(run.clients))
    if not names:
        rule = f"the run's clients are {', '.join(run.clients)}"
        raise DataError(f"{folder} has rows of {', '.join(sorted(clients))}", rule, "name the files: NAME=FILE")
    sides = {name: _side(run.config, clients[name]) for name in names}
    return {name: _scored(run, name, rows, own=_is_own(run, name, rows)) for name, rows in sides.items()}


def _moved(data: DataConfig, folder: Path) -> DataConfig:
    """Return a recipe's data with its files in a folder they were moved to; else the folder as ``data.folder``."""
    settings = data.model_dump(exclude_none=True)
    try:
        if data.folder:
            settings["folder"] = _under(folder, data.folder)
        elif data.clients:
            settings["clients"] = {
                n: {side: _under(folder, path) for side, path in files.items()}
                for n, files in settings["clients"].items()
            }
        elif data.partition:
            sources = {side: settings["partition"].get(side) for side in ("source", "test")}
            settings["partition"] |= {side: _under(folder, path) for side, path in sources.items() if path}
        else:
            raise FileNotFoundError
    except FileNotFoundError:
        kept = {name: settings[name] for name in ("columns", "on_bad_row", "test_fraction", "validation_fraction")}
        return DataConfig.model_validate({"folder": str(folder), **kept})
    return DataConfig.model_validate(settings)


def _under(folder: Path, source: str) -> str:
    """Return where a file or folder of the recipe lies under a folder: by as much of its old path as is there.

    Raises:
        FileNotFoundError: Nowhere.
    """
    if source.startswith(HUB):
        return source
    parts = Path(source).parts[1:]
    for place in (folder.joinpath(*parts[start:]) for start in range(len(parts))):
        if place.exists():
            return str(place)
    raise FileNotFoundError(source)


def _side(config: RunConfig, rows: ClientRows) -> tuple[Row, ...]:
    return rows.validation if config.evaluation.split == "validation" else rows.test


def _scored(run: TrainedRun, name: str, rows: tuple[Row, ...], *, own: bool) -> Elsewhere:
    """Return rows as they are scored: of the run's own as many as the run scores, of others all."""
    return Elsewhere(rows[: run.config.evaluation.rows] if own else rows, own)


def _is_own(run: TrainedRun, name: str, rows: tuple[Row, ...]) -> bool:
    entry = _entries(run).get(name, {})
    return has_rows(entry, run.config.evaluation.split, rows_hash(ClientRows((), rows)))


def _entries(run: TrainedRun) -> dict[str, dict[str, Any]]:
    """Return what the run keeps of its clients' rows: a server's directory has nothing of silos that took part."""
    own = read_manifest(run.run.partition) if run.run.partition.exists() else {}
    return own | {name: record["rows"] for name, record in run.joined.items()}


def said(rows: dict[str, Elsewhere]) -> Iterator[str]:
    """Yield a line for every client that is scored on other rows than the run's own."""
    for name, its in sorted(rows.items()):
        if not its.own:
            yield f"{name}: these {len(its.rows)} rows are not those that the run keeps for scoring"
