"""A silo's state folder: private to one user, with a folder per run and the socket of its worker."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

from flexperts.errors import ArtifactError, ConfigError, FederationError

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


def identity_file(state: Path) -> Path:
    """Return the file of the silo's identity in secure aggregation; it need not exist."""
    return state / "identity.json"


def private_folder(state: Path, run: str) -> Path:
    """Return the folder of one run's private state; it need not exist.

    Args:
        state: The state folder.
        run: The run's id; it is received from outside, so it must not be a path.
    """
    if not _RUN.fullmatch(run):
        raise FederationError(f"run {run[:80]!r}", "a run's id is 32 digits 0-9a-f", _LISTED)
    return state / "runs" / run


def replies_folder(state: Path, run: str) -> Path:
    """Return the folder of the last replies to one run's server; it need not exist."""
    return state / "replies" / private_folder(state, run).name


def run_ids(state: Path) -> list[str]:
    """Return the ids of the runs in a state folder, sorted."""
    return sorted(p.name for p in (state / "runs").glob("*") if _RUN.fullmatch(p.name) and p.is_dir())


def make_private(state: Path) -> None:
    """Create a state folder that only this user can enter, or check an existing one."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{state}", f"it cannot be created ({error})", "choose another state folder") from error
    check_private(state)


def check_private(state: Path) -> None:
    """Refuse a state folder that others can enter, or that cannot hold a socket; the folder need not exist."""
    check_length(socket_of(state))
    if state.exists():
        check_own(state, 0o077, "group or others can enter it", f"run chmod 700 {state}")


def check_own(folder: Path, closed: int, rule: str, remedy: str) -> None:
    """Refuse a folder of another user, or one that others can use.

    Args:
        folder: The folder.
        closed: Bits that its mode may not have.
        rule: What the error says about a mode with one of them.
        remedy: What it tells the user to do.
    """
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ArtifactError(f"{folder}", "it is not a folder of this user", "choose another folder")
    if found.st_mode & closed:
        raise ArtifactError(f"{folder}", rule, remedy)


def check_length(path: Path) -> None:
    """Refuse a path that is too long for a socket."""
    length = len(os.fsencode(path))
    if length > _LONGEST_SOCKET:
        raise ConfigError(
            f"{path}",
            f"the path of a socket has at most {_LONGEST_SOCKET} bytes, this one has {length}",
            "choose a folder with a shorter path",
        )


def delete_run(state: Path, run: str) -> None:
    """Delete one run's private state; what it has received stays in the ledger."""
    folder = private_folder(state, run)
    if not folder.is_dir():
        raise ArtifactError(f"run {run}", f"{state} has no such run", _LISTED)
    try:
        shutil.rmtree(replies_folder(state, run), ignore_errors=True)
        shutil.rmtree(folder)
    except OSError as error:
        raise ArtifactError(f"{folder}", f"it cannot be deleted ({error})", "delete it by hand") from error
