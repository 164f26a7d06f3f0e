"""Who may ask the worker: the socket that other users can open, and the kernel's word on who has opened it."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from flexperts.config.silo import SiloSocket
from flexperts.deployment.state import check_length, check_own
from flexperts.errors import ArtifactError, ConfigError

_PEER = "3i"
"""What SO_PEERCRED gives: process, user, group."""


def allowed_users(door: SiloSocket | None) -> frozenset[int]:
    """Return the ids of the users whose processes get answers; without a socket for others, this user's."""
    return frozenset({os.getuid()}) if door is None else frozenset(_user(name) for name in door.users)


def user_of_peer(connection: socket.socket) -> int:
    """Return the user of the process that opened a Unix socket, as the kernel recorded it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_PEER))
    return int(struct.unpack(_PEER, credentials)[1])


def check_names(door: SiloSocket) -> None:
    """Refuse a socket whose users or group this machine does not have, or whose path is too long."""
    check_length(Path(door.path))
    allowed_users(door)
    _group(door.group)


def make_folder(door: SiloSocket) -> Path:
    """Make the folder of a socket that a group can open, or check an existing one, and return the socket's path."""
    check_names(door)
    path = Path(door.path)
    try:
        path.parent.mkdir(mode=0o700)
    except FileExistsError:
        rule = "group or others can replace the socket in it"
        check_own(path.parent, 0o022, rule, f"run chmod go-w {path.parent}")
    except OSError as error:
        raise ArtifactError(
            f"{path.parent}", f"it cannot be created ({type(error).__name__})", "choose another socket.path"
        ) from error
    else:
        give_to_group(path.parent, door, 0o710)
    return path


def give_to_group(path: Path, door: SiloSocket, mode: int) -> None:
    """Let the socket's group use a file or folder of this user."""
    try:
        os.chown(path, -1, _group(door.group), follow_symlinks=False)
    except PermissionError as error:
        raise ConfigError(
            f"socket.group = {door.group!r}",
            "the worker's user is not a member of this group",
            f"run `usermod -aG {door.group} USER` for the worker's USER, and start the worker again",
        ) from error
    path.chmod(mode)


def _user(name: str) -> int:
    return _id("socket.users", "user", name, lambda: pwd.getpwnam(name).pw_uid)


def _group(name: str) -> int:
    return _id("socket.group", "group", name, lambda: grp.getgrnam(name).gr_gid)


def _id(setting: str, kind: str, name: str, look_up: Callable[[], int]) -> int:
    """Return an id that is written as a number, or look up a name. Root has its name only; 2**32 - 1 means none."""
    if name.isascii() and name.isdigit() and 0 < int(name) < 2**32 - 1:
        return int(name)
    try:
        return look_up()
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{setting}: {name!r}", f"this machine has no such {kind}", f"create the {kind}, or correct the name"
        ) from error
