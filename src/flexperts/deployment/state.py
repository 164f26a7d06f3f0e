"""A silo's state folder: private to one user, with a folder per run and the socket of its worker."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexperts.artifacts import RunDirectory
from flexperts.config.changes import recipe_changes, rounds_before
from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, partition_manifest
from flexperts.data.unchanged import check_same_rows
from flexperts.errors import ArtifactError, ConfigError, FederationError
from flexperts.files import mapping, read_json, write_json, write_text
from flexperts.parameters.store import load_personal
from flexperts.recipe import recorded_recipe

_RUN = re.compile(r"[0-9a-f]{32}")
_LISTED = "choose an id that `flexperts silo runs` lists"
_LONGEST_SOCKET = 107
"""Most bytes in the path of a Unix socket; a limit of the system."""


def socket_of(state: Path) -> Path:
    """Return the worker's socket in a state folder."""
    return state / "worker.sock"


def lock_of(state: Path) -> Path:
    """Return the file that a worker locks while it serves a state folder."""
    return state / "worker.lock"


def run_folder(state: Path, run: str) -> Path:
    """Return the folder of one run's private state; it need not exist.

    Args:
        state: The state folder.
        run: The run's id; it is received from outside, so it must not be a path.

    Raises:
        FederationError: The id is not valid.
    """
    if not _RUN.fullmatch(run):
        raise FederationError(f"run {run[:80]!r}", "a run's id is 32 digits 0-9a-f", _LISTED)
    return state / "runs" / run


def run_ids(state: Path) -> list[str]:
    """Return the ids of the runs in a state folder, sorted."""
    return sorted(p.name for p in (state / "runs").glob("*") if _RUN.fullmatch(p.name) and p.is_dir())


def make_private(state: Path) -> None:
    """Create a state folder that only this user can enter, or check an existing one.

    Raises:
        ArtifactError: It is not private, or cannot be created.
        ConfigError: The socket's path would be too long.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{state}", f"it cannot be created ({error})", "choose another state folder") from error
    check_private(state)


def check_private(state: Path) -> None:
    """Refuse a state folder that others can enter, or that cannot hold a socket; the folder need not exist.

    Raises:
        ArtifactError: It is not a folder of this user, or group or others can enter it.
        ConfigError: The socket's path would be too long.
    """
    length = len(os.fsencode(socket_of(state)))
    if length > _LONGEST_SOCKET:
        raise ConfigError(
            f"{socket_of(state)}",
            f"the path of a socket has at most {_LONGEST_SOCKET} bytes, this one has {length}",
            "choose a state folder with a shorter path",
        )
    if not state.exists():
        return
    found = state.stat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ArtifactError(f"{state}", "it is not a folder of this user", "choose another state folder")
    if found.st_mode & 0o077:
        raise ArtifactError(f"{state}", "group or others can enter it", f"run chmod 700 {state}")


def forget(state: Path, run: str) -> None:
    """Delete one run's private state.

    Raises:
        FederationError: The id is not valid.
        ArtifactError: There is no such run, or it cannot be deleted.
    """
    folder = run_folder(state, run)
    if not folder.is_dir():
        raise ArtifactError(f"run {run}", f"{state} has no such run", _LISTED)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ArtifactError(f"{folder}", f"it cannot be deleted ({error})", "delete it by hand") from error


_CHOICES = "choices.json"


@dataclass(frozen=True)
class KeptRun:
    """One run's private state.

    Args:
        run: The run's id.
        method: Its method.
        round: Last round in which the silo trained.
        bytes: Size of all its files.
    """

    run: str
    method: str
    round: int
    bytes: int


def keep_recipe(folder: Path, recipe: str) -> None:
    """Write a run's recipe, as received from the server, to the run's folder, or check that it is the same.

    The number of rounds may differ: the server can change it during a run.

    Raises:
        ArtifactError: The recipe is another one: states of two runs must not mix.
    """
    kept = RunDirectory.open(folder).config_toml if (folder / "config.toml").exists() else None
    if kept is None or rounds_before(kept, recipe):
        write_text(folder / "config.toml", recipe)
    elif kept != recipe:
        rule = f"it holds a run with another recipe ({recipe_changes(kept, recipe)})"
        raise ArtifactError(f"{folder}", rule, "start a new run on the server")


def with_kept_choices(config: RunConfig, folder: Path) -> RunConfig:
    """Return a run with this silo's earlier choices for settings that the recipe leaves open.

    Raises:
        ArtifactError: The file of choices is damaged.
    """
    if not (note := folder / _CHOICES).exists():
        return config
    noted = mapping(note, read_json(note))
    return config.with_choices(noted.get("template_date"), noted.get("max_new_tokens"))


def keep_choices(folder: Path, template_date: str | None, max_new_tokens: int) -> None:
    """Write this silo's choices for a run: the templates' date by its clock, the answer limit by its rows."""
    write_json(folder / _CHOICES, {"template_date": template_date, "max_new_tokens": max_new_tokens})


def keep_rows(folder: Path, clients: Clients) -> bool:
    """Write counts and hashes of the rows with which a run starts at this silo, or check that they are the same.

    Returns:
        Whether the run began with an earlier version, which wrote no such file: its first rows are not known.

    Raises:
        ArtifactError: The file is damaged.
        DataError: The rows are others: rows that were trained on could be tested on.
    """
    note = RunDirectory(folder).partition
    if note.exists():
        check_same_rows(note, clients)
        return False
    write_json(note, partition_manifest(clients))
    return (folder / "config.toml").exists()


def kept_runs(state: Path, client: str) -> Iterator[KeptRun]:
    """Yield the runs of a state folder, sorted by id.

    Args:
        state: The state folder.
        client: The silo's name.

    Raises:
        ArtifactError: A file is damaged.
    """
    for run in run_ids(state):
        folder = run_folder(state, run)
        recipe = recorded_recipe(RunDirectory.open(folder).path)
        personal = folder / "personal" / f"{client}.safetensors"
        last = load_personal(personal)[1].round if personal.exists() else 0
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield KeptRun(run, recipe.method.name, last, size)
