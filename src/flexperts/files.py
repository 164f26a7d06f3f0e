"""Reading and writing files: writes are atomic, and a damaged file is an ``ArtifactError``.

Only one process at a time may write a folder. It holds a ``flock`` lock on a file ``.lock`` in it, which the system
releases when the process ends. The file exists while the lock is held, and is left behind by a killed process.
Network file systems either share such locks between machines (NFS does), or keep them to one machine, or refuse
them.

Files are readable by their owner only, unless a caller says otherwise. A new file is opened under a random name and
never through a link, so that another user of the folder can neither read it nor lead it elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flexperts.errors import ArtifactError

_SEAL = "sha256"
LOCK = ".lock"
PRIVATE, PUBLIC = 0o600, 0o666
"""Modes of files: for their owner only, or for everyone whom the process's umask admits."""


def write_bytes(path: Path, content: bytes, *, mode: int = PRIVATE) -> None:
    """Write a file atomically: a reader sees the old file or the new one, never a part.

    The content is on disk when this returns. A link in the file's place is replaced, not followed. The folder's
    ``sole_writer`` removes the temporary file of a killed process: at its end, or the next one at its start.

    Args:
        path: The file; folders that do not exist are created with the same access.
        content: The bytes.
        mode: ``PRIVATE`` or ``PUBLIC``.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        make_folder(path.parent, mode)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def make_folder(folder: Path, mode: int = PRIVATE) -> None:
    """Create a folder, and those that it is in, if they do not exist; ``mode`` is that of files in it."""
    if folder.exists():
        return
    for place in reversed((folder, *folder.parents)):
        if not place.exists():
            place.mkdir(mode | (mode & 0o444) >> 2, exist_ok=True)


def move_file(path: Path, to: Path) -> None:
    """Move a file into the place of another one, whose folder is created if it does not exist."""
    try:
        make_folder(to.parent)
        path.replace(to)
    except OSError as error:
        raise unwritable(to, error) from error


def placeless(value: Any) -> Any:
    """Return a value without folders: absolute paths are cut to their last name, also in lists and mappings."""
    if isinstance(value, Mapping):
        return {key: placeless(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [placeless(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def unwritable(path: Path, error: Exception) -> ArtifactError:
    """Return the error for a file that cannot be written."""
    return ArtifactError(f"{path}", f"it cannot be written ({error})", "free some space or choose another folder")


def unlinked(path: str, flags: int) -> int:
    """Open a private file that is not a link; an ``opener`` for ``open``."""
    return os.open(path, flags | os.O_NOFOLLOW, PRIVATE)


def write_text(path: Path, text: str, *, mode: int = PRIVATE) -> None:
    """Write a text file; see ``write_bytes``."""
    write_bytes(path, text.encode(), mode=mode)


def write_json(path: Path, value: Any, *, indent: int | None = 2, mode: int = PRIVATE) -> None:
    """Write a value as JSON, atomically; without ``indent`` on one line, for large values."""
    write_text(path, json_text(value, indent=indent) + "\n", mode=mode)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON; numbers that are not finite become null, because JSON does not have them."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Return a JSON file's value."""
    return parsed_json(path, content_of(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a JSON-lines file."""
    return [mapping(path, parsed_json(path, line)) for line in content_of(path).splitlines()]


def content_of(path: Path) -> bytes:
    """Return a file's bytes."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}", f"it cannot be read ({error})", "give a finished run's directory") from error


def text_of(path: Path) -> str:
    """Return a file's text."""
    try:
        return content_of(path).decode()
    except UnicodeDecodeError as error:
        raise damaged(path, error) from error


def parsed_json(path: Path, text: bytes) -> Any:
    """Return the value of JSON text from a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def mapping(path: Path, value: Any) -> dict[str, Any]:
    """Return a value from a file as a mapping."""
    if not isinstance(value, dict):
        raise damaged(path, "it does not hold a JSON object")
    return value


def damaged(path: Path, why: object) -> ArtifactError:
    """Return the error for a damaged file."""
    return ArtifactError(f"{path}", f"it is damaged ({why})", "restore it from a copy or run again")


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum: JSON alone would not detect a changed digit in a score."""
    found = _finite(record)
    return {_SEAL: _checksum(found), **found}


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def opened(path: Path, value: Any, *, needed: bool = False) -> dict[str, Any]:
    """Return a record without its checksum, after checking it; runs of earlier versions have no checksum."""
    record = dict(mapping(path, value))
    digest = record.pop(_SEAL, None)
    if (needed or digest is not None) and _checksum(record) != digest:
        raise damaged(path, "its checksum does not fit")
    return record


@contextmanager
def sole_writer(
    folder: Path, *, patience: float = 0.0, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Lock a folder against other writing processes inside the block.

    The folder is created if it does not exist, and removed again if it stays empty. A new or empty one is closed to
    other users. Temporary files of killed processes in it are removed; links to other folders are refused.

    Args:
        folder: The folder.
        patience: Seconds to wait for another process to end.
        waiting: Receives a line that names this other process.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                with suppress(PermissionError):  # another user's folder; its files are private all the same
                    folder.chmod(0o700)
        except OSError as error:
            raise _unlockable(folder, error) from error
        with holding(folder / LOCK, folder, patience=patience, waiting=waiting):
            _refuse_links(folder)
            remove_parts(folder)
            try:
                yield
            finally:
                remove_parts(folder)  # a worker process may have been killed while it wrote
    finally:
        for place in made:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def _refuse_links(folder: Path) -> None:
    """Refuse links to folders inside a folder: files that are written there would go elsewhere."""
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir():
            raise ArtifactError(
                f"{path}", "it is a link, and nothing is written through links", "replace it with the folder itself"
            )


def remove_parts(folder: Path) -> None:
    """Remove temporary files of killed processes; no process may be writing the folder."""
    for part in folder.rglob(".*.part"):  # older versions named them by the file
        with suppress(OSError):  # a folder, or read-only
            part.unlink()


@contextmanager
def holding(
    path: Path, what: Path, *, patience: float = 0.0, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold a lock inside the block.

    Args:
        path: The lock file; its folder exists.
        what: The locked file or folder, for messages.
        patience: Seconds to wait for another process to end.
        waiting: Receives a line that names this other process.
    """
    lock = FileLock(path)
    try:
        _acquire(lock, path, patience, waiting)
    except Timeout as error:
        raise ArtifactError(
            f"{what}", f"{holder(path)} writes it", "wait until that process has ended, or stop it"
        ) from error
    except OSError as error:
        raise _unlockable(what, error) from error
    try:
        with suppress(OSError), open(path, "w", encoding="utf-8", opener=unlinked) as file:
            file.write(f"{os.getpid()}\n{socket.gethostname()}\n")  # on a full disk, messages cannot name us
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the release: later processes then create a new file
        lock.release()


def _acquire(lock: FileLock, path: Path, patience: float, waiting: Callable[[str], None] | None) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not patience:
            raise
        if waiting:
            waiting(f"waiting up to {patience:.0f} s for {holder(path)}")
        lock.acquire(timeout=patience)


def holder(path: Path) -> str:
    """Return a description of the process that holds a lock, as far as the lock file names it."""
    with suppress(OSError, ValueError):
        pid, host, *_ = path.read_text(encoding="utf-8").split()
        return f"process {int(pid)} on {host}"
    return "another process"


def writer(folder: Path) -> str | None:
    """Return a description of the process that writes a folder; None if none does.

    A killed process leaves the file behind, without its lock. Only this machine's locks are tried.
    """
    path = folder / LOCK
    try:
        _pid, host, *_ = path.read_text(encoding="utf-8").split()
        if host == socket.gethostname() and not _is_locked(path):
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # a process is just taking it, or another user's run
        pass
    return holder(path)


def _is_locked(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once, as the file is closed
        except BlockingIOError:
            return True
    return False


def _unlockable(what: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"{what}",
        f"it cannot be locked for writing ({error})",
        "choose a folder on a local disk that you can write to",
    )
