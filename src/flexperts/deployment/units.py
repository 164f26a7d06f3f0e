"""Systemd units for server and silo, and a script with bubblewrap that lets a SuperNode run as a stranger."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import flexperts
from flexperts.config.silo import SiloConfig
from flexperts.errors import ConfigError
from flexperts.files import write_text
from flexperts.observer import current_observer

_TEMPLATES = Path(__file__).parent / "units"
_PATH = re.compile(r"(/[\w.+-]+)+")
_NAME = re.compile(r"[a-z_][a-z0-9_-]*")
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):(?P<port>[0-9]{1,5})")
_HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")
_PACKAGE = Path(flexperts.__file__).parents[1]
_BIN = Path(sys.prefix) / "bin"


def write_units(file: Path, silo: SiloConfig, superlink: str, out: Path) -> list[Path]:
    """Write the units, the script, and what creates their users and folders, for one silo; return the files.

    Args:
        file: The silo's file.
        silo: Its settings, with a socket for another user.
        superlink: HOST:PORT of the SuperLink; its certificate must have the host's name.
        out: A new folder.
    """
    return _write("silo", _values(file, silo, superlink), out)


def write_server_units(out: Path) -> list[Path]:
    """Write the unit of the SuperLink, and what creates its user; return the files.

    Args:
        out: A new folder.
    """
    _check_paths([str(_BIN), *map(str, _roots())])
    return _write("server", {"BIN": str(_BIN)}, out)


def _write(kind: str, values: dict[str, str], out: Path) -> list[Path]:
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out}", f"it cannot be created ({error})", "choose a new folder") from error
    written = []
    values["HARDENED"] = (_TEMPLATES / "hardened.conf").read_text(encoding="utf-8").strip()
    for template in sorted((_TEMPLATES / kind).iterdir()):
        path = out / template.name
        write_text(path, _rendered(template, values))
        path.chmod(0o755 if template.name == "isolated-supernode" else 0o644)
        written.append(path)
    return written


def _values(file: Path, silo: SiloConfig, superlink: str) -> dict[str, str]:
    address = _ADDRESS.fullmatch(superlink)
    if address is None or not re.search("[a-z]", address["host"], re.IGNORECASE):
        rule = "it must be the name in the SuperLink's certificate and a port, such as server.example:443"
        raise ConfigError(f"--superlink {superlink!r}", rule, "a number cannot be looked up in the sandbox")
    door = silo.socket
    if door is None:
        raise ConfigError(
            f"{file}",
            "it has no [socket], so its worker answers only its own user",
            "add [socket] with path, group and users; see docs/deploy.md",
        )
    names = {"socket.group": door.group, "socket.users": door.users[0]}
    for key, name in names.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{key} {name!r}", "units need a name of a-z, 0-9, '_' and '-'", "use such a name")
    roots = [str(p) for p in _roots()]
    paths = {"SILO": file.absolute(), "STATE": Path(silo.state), "SOCKET": Path(door.path), "BIN": _BIN}
    texts = {key: str(path) for key, path in paths.items()}
    folder = str(Path(door.path).parent)
    writable = [texts["STATE"], folder, *([str(Path(silo.metrics).parent)] if silo.metrics else [])]
    _check_paths([*texts.values(), *writable, *roots])
    return texts | {
        "FOLDER": folder,
        "WRITABLE": " ".join(writable),
        "NAME": silo.name,
        "GROUP": door.group,
        "APP": door.users[0],
        "HOST": address["host"],
        "PORT": address["port"],
        "PACKAGE": str(_PACKAGE),
        "ROOTS": " ".join(roots),
    }


def _check_paths(paths: list[str]) -> None:
    """Refuse paths that a unit cannot have, and say which ones it would hide."""
    for path in dict.fromkeys(paths):
        if path.startswith(_HIDDEN):
            current_observer().notice(
                f"{path} is hidden by the units' ProtectHome or PrivateTmp; use another folder"
            )
        if not _PATH.fullmatch(path):
            rule = "a path in a unit has letters, digits, '.', '_', '+' and '-' only"
            raise ConfigError(path, rule, "move the folder, or give it another name")


def _roots() -> list[Path]:
    """Return the folders that hold Python, its packages and flexperts, without those in /usr."""
    found = dict.fromkeys(Path(p).absolute() for p in (sys.prefix, sys.base_prefix, _PACKAGE))
    outer = [p for p in found if not p.is_relative_to("/usr")]
    return [p for p in outer if not any(p != other and p.is_relative_to(other) for other in outer)]


def _rendered(template: Path, values: dict[str, str]) -> str:
    text = template.read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text
