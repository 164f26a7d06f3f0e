"""Rows from other places on which a finished run is scored, and whether they are the run's own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexperts.client.workspace import Workspace
from flexperts.config.data import ClientFiles, DataConfig
from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, read_client_file, rows_hash
from flexperts.data.rows import ClientRows, Row
from flexperts.data.sources import HUB
from flexperts.data.unchanged import has_rows, read_manifest
from flexperts.errors import ConfigError, DataError
from flexperts.finished.trained import TrainedRun, own_of_record, with_rows_of
from flexperts.observer import current_observer
from flexperts.recipe import located

_SIDES = ("train", "test")


@dataclass(frozen=True)
class Elsewhere:
    """One client's rows from another place.

    Args:
        rows: The rows to score.
        own: Whether they are, by their hash, the rows that the run uses for scoring this client.
    """

    rows: tuple[Row, ...]
    own: bool


def rows_elsewhere(run: TrainedRun, given: Sequence[str]) -> dict[str, Elsewhere]:
    """Return the rows that ``--data`` asks for, by client.

    Args:
        run: The finished run.
        given: Each is ``NAME=SOURCE``, one client's rows (a file or ``hub:org/name``), or a folder: the place of
            the recipe's files now, or a folder with a sub-folder per client.
    """
    found: dict[str, Elsewhere] = {}
    for one in given:
        name, equals, source = one.partition("=")
        parts = {name: _of_source(run, name, source)} if equals else _of_folder(run, Path(one))
        if twice := sorted(found.keys() & parts.keys()):
            raise ConfigError(f"--data {one}", f"{twice[0]} has rows already", "give each client's rows once")
        found |= parts
    return found


def _of_source(run: TrainedRun, name: str, source: str) -> Elsewhere:
    """Return one client's rows from a file: the held-out share if it is the run's own file, else all rows."""
    if name not in run.clients:
        raise ConfigError(f"--data {name}=...", f"the run's clients are {', '.join(run.clients)}", "choose one")
    source = located(source, Path())
    data, joined = run.config.data, run.joined.get(name, {}).get("data")
    settings = own_of_record(joined) if joined else data.settings_of(name)
    rows_only = with_rows_of(run.config, name, ClientFiles(**settings, train=source))
    say = current_observer().notice
    whole = tuple(read_client_file(name, source, rows_only.data.of_client(name), "test", say))
    if _is_own(run, name, whole):
        return _scored(run, name, whole, own=True)
    try:
        held_out = _side(run.config, _clients(run, rows_only)[name])
    except DataError:  # too few passages for a held-out share, such as a file of test rows
        held_out = ()
    if _is_own(run, name, held_out):
        return _scored(run, name, held_out, own=True)
    if has_rows(_entries(run).get(name, {}), "train", rows_hash(ClientRows(whole, ()))):
        raise DataError(source, f"{name} was trained on these rows", "give rows that it was not trained on")
    return _scored(run, name, whole, own=False)


def _clients(run: TrainedRun, config: RunConfig) -> Clients:
    """Return the rows that a new run of this recipe would have."""
    return Workspace(config, run.workspace.base, run.workspace.untouched, given=run.workspace.given).clients


def _of_folder(run: TrainedRun, folder: Path) -> dict[str, Elsewhere]:
    """Return the rows in a folder, for all clients with scores that it has."""
    if not folder.is_dir():
        rule = "it must be an existing folder, or NAME=FILE"
        raise ConfigError(f"--data {folder}", rule, "give an existing path, or put the client's name before a file")
    clients = _clients(run, run.config.model_copy(update={"data": _moved(run.config.data, folder.resolve())}))
    names = sorted(clients.keys() & set(run.scored))
    if not names:
        rule = f"the run has scores of {', '.join(run.scored)}"
        raise DataError(f"{folder} has rows of {', '.join(sorted(clients))}", rule, "give the files as NAME=FILE")
    sides = {name: _side(run.config, clients[name]) for name in names}
    return {name: _scored(run, name, rows, own=_is_own(run, name, rows)) for name, rows in sides.items()}


def _moved(data: DataConfig, folder: Path) -> DataConfig:
    """Return a recipe's data with its files in their new folder; if they are not there, it is ``data.folder``."""
    settings = data.model_dump(exclude_none=True)
    try:
        if data.folder:
            settings["folder"] = _under(folder, data.folder)
        elif data.clients:
            settings["clients"] = {
                n: its.own | {side: _under(folder, path) for side in _SIDES if (path := getattr(its, side))}
                for n, its in data.clients.items()
            }
        elif data.partition:
            sources = {side: settings["partition"].get(side) for side in ("source", "test")}
            settings["partition"] |= {side: _under(folder, path) for side, path in sources.items() if path}
        else:
            raise FileNotFoundError
    except FileNotFoundError:
        kept: dict[str, Any] = {name: settings[name] for name in ("columns", "format", "on_bad_row")}
        kept["clients"] = {n: its.own for n, its in data.clients.items() if (folder / n).is_dir()}
        return DataConfig.model_validate({"folder": str(folder), **kept, **data.held_out()})
    return DataConfig.model_validate(settings)


def _under(folder: Path, source: str) -> str:
    """Return the new path of a recipe's file under a folder: the longest end of its old path that exists there."""
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
    """Return the rows to score: as many as the run scores if they are its own, else all."""
    return Elsewhere(rows[: run.config.evaluation.rows] if own else rows, own)


def _is_own(run: TrainedRun, name: str, rows: tuple[Row, ...]) -> bool:
    entry = _entries(run).get(name, {})
    return has_rows(entry, run.config.evaluation.split, rows_hash(ClientRows((), rows)))


def _entries(run: TrainedRun) -> dict[str, dict[str, Any]]:
    """Return the hashes and counts of clients' rows; a server's directory has none of silos that took part."""
    own = read_manifest(run.run.partition) if run.run.partition.exists() else {}
    return own | {name: record["rows"] for name, record in run.joined.items()}


def said(rows: dict[str, Elsewhere]) -> Iterator[str]:
    """Yield a line for every client that is scored on rows other than the run's own."""
    for name, its in sorted(rows.items()):
        if not its.own:
            yield f"{name}: these {len(its.rows)} rows are not those that the run uses for scoring"
