"""What `deploy/` says of its containers, and the same boundaries as words of bubblewrap, without an engine."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flexperts.deployment.units import _PACKAGE, _roots

DEPLOY = Path(__file__).parents[2] / "deploy"
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


@dataclass
class Image:
    """One target of the Containerfile, with what it takes from the stages below it."""

    user: str = "0:0"
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    """Path in the image -> file of this repository."""
    folders: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Path in the image -> user, group, mode."""


def images() -> dict[str, Image]:
    """Return the Containerfile's stages by name."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, Image] = {}
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            below, _, name = rest.split()
            one = found[name] = _copy(found.get(below, Image()))
        elif word == "USER":
            one.user = rest
        elif word == "ENV":
            one.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "CMD":
            one.command = yaml.safe_load(rest)
        elif word == "HEALTHCHECK":
            one.health = yaml.safe_load(rest[rest.index("[") :])
        elif word == "COPY" and not rest.startswith("--from"):
            *sources, there = rest.split()
            places = [there + Path(source).name if there.endswith("/") else there for source in sources]
            one.files |= {place: DEPLOY.parent / s for place, s in zip(places, sources, strict=True)}
        elif word == "RUN":
            for user, group, mode, path in re.findall(r"install -d -o (\d+) -g (\d+) -m (\d+) (\S+)", rest):
                one.folders[path] = int(user), int(group), int(mode, 8)
    return found


def _copy(one: Image) -> Image:
    return Image(one.user, [*one.command], [*one.health], {**one.environment}, {**one.files}, {**one.folders})


def services(name: str, settings: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the services of a compose file, with the values of its variables."""

    def value(found: re.Match[str]) -> str:
        key, how, other = found.groups()
        if key not in settings and how == "?":
            raise KeyError(f"{key}: {other}")
        return settings.get(key, other if how == "-" else "")

    text = _VARIABLE.sub(value, (DEPLOY / name).read_text(encoding="utf-8"))
    return dict(yaml.safe_load(text)["services"])


def image_of(service: Mapping[str, Any]) -> Image:
    """Return the image of a service."""
    return images()[service["image"].removeprefix("flexperts/")]


def user_of(service: Mapping[str, Any]) -> tuple[int, int]:
    """Return the user and the group of a service's processes."""
    user, _, group = str(service.get("user") or image_of(service).user).partition(":")
    return int(user), int(group)


def mounts(service: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Return path in the container -> source, and whether it may be written."""
    parts = [text.split(":") for text in service.get("volumes", [])]
    return {there: (source, mode != ["ro"]) for source, there, *mode in parts}


def command_of(service: Mapping[str, Any]) -> list[str]:
    """Return a service's command; as compose does, a text is split at spaces."""
    command = service.get("command") or image_of(service).command
    return shlex.split(command) if isinstance(command, str) else [*command]


def sandboxed(service: Mapping[str, Any], project: Path) -> list[str]:
    """Return the words that run a service with bubblewrap, as root.

    In the sandbox are the service's mounts and secrets, this machine's /usr and Python in place of the image's, and
    nothing else. A service with a network has that of the calling process.

    Args:
        service: The service.
        project: Folder of the compose file, and of the volumes, as folders of their names.
    """
    image = image_of(service)
    words = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--new-session"]
    words += ["--unshare-net"] if service.get("network_mode") == "none" else []
    words += ["--clearenv", "--proc", "/proc", "--dev", "/dev"]
    system = ["/usr", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ld.so.cache", *map(str, _roots())]
    secrets = {f"/run/secrets/{name}": project / name for name in service.get("secrets", [])}
    for there in [*system, *image.files, *mounts(service), *secrets]:  # bwrap's own folders are root's alone
        for parent in reversed(Path(there).parents[:-1]):
            words += ["--perms", "0755", "--dir", str(parent)]
    for path in system:
        words += ["--ro-bind-try", path, path]
    for link in ("bin", "sbin", "lib", "lib64"):
        words += ["--symlink", str(Path(f"/{link}").readlink()), f"/{link}"]
    for path in service.get("tmpfs", []):
        words += ["--perms", "1777", "--tmpfs", path]
    for there, source in image.files.items():
        words += ["--ro-bind", str(source), there]
    for there, (source, writable) in mounts(service).items():
        place = project / source
        if not place.exists():  # a volume: it begins as the folder in the image that it covers
            place.mkdir()
            owner, its, mode = image.folders[there]
            os.chown(place, owner, its)
            place.chmod(mode)
        words += ["--bind" if writable else "--ro-bind", str(place), there]
    for there, source in secrets.items():
        words += ["--ro-bind", str(source), there]
    words += ["--remount-ro", "/"] if service.get("read_only") else []
    return [*words, *as_its_user(service, command_of(service))]


def as_its_user(service: Mapping[str, Any], command: list[str]) -> list[str]:
    """Return the words that run a command with a service's user, privileges and environment."""
    user, group = user_of(service)
    words = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--inh-caps=-all"]
    words += ["--bounding-set=-all"] if service.get("cap_drop") == ["ALL"] else []
    words += ["--no-new-privs"] if "no-new-privileges:true" in service.get("security_opt", []) else []
    here = {"PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin", "PYTHONPATH": str(_PACKAGE), "OMP_NUM_THREADS": "1"}
    environment = image_of(service).environment | service.get("environment", {}) | here
    return [*words, "env", "-i", *(f"{key}={text}" for key, text in environment.items()), *command]
