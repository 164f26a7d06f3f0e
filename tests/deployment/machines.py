"""Machines with addresses, users and files of their own on one switch, and a page that is followed on them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

import flexperts
from flexperts.deployment.units import _roots

from .cluster import BIN, wait_until

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
_BLOCK = re.compile(r'^```\w+ title="([^"\n]+)"\n(.*?)^```$|^## (\d)\.', re.MULTILINE | re.DOTALL)
_OWN = ("etc", "home", "root", "srv", "run", "var/log", "var/lib/nginx", "tmp")  # /tmp last: it may hide the folder
_BOOT = """
for one in $ROOTS; do mkdir -p "$PWD$one"; mount --bind "$one" "$PWD$one"; done
for one in "$@"; do mount --rbind "$PWD/$one" "/$one"; done
ip link set lo up; echo up; exec sleep 1800
"""
TERMINAL = ", a terminal of its own"


def blocks(part: int) -> list[tuple[str, str]]:
    """Return title and text of the page's titled blocks in one of its numbered parts, in their order."""
    found, current = [], ""
    for title, text, number in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        current = number or current
        if title and current == str(part):
            found.append((title, text))
    assert found
    return found


def require_machines() -> None:
    """Skip where such machines cannot be made."""
    if os.getuid():
        pytest.skip("only root can make networks")
    if missing := [t for t in ("curl", "ip", "nginx", "nsenter", "setpriv", "unshare") if shutil.which(t) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    tried = ["unshare", "--net", "sh", "-c", "ip link add name one type bridge && ip link add name two type veth"]
    if (done := subprocess.run(tried, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no networks here: {done.stderr.strip()}")


class _Namespaces:
    """Namespaces that end, with all their processes, when the first of these does: at ``close``, or in time."""

    def __init__(self, folder: Path, script: str, *arguments: str, kinds: tuple[str, ...]) -> None:
        words = ["unshare", *(f"--{kind}" for kind in kinds), "sh", "-ec", script, "sh", *arguments]
        roots = " ".join(str(root) for root in _roots() if str(root).startswith(tuple(f"/{one}/" for one in _OWN)))
        self._first = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, env=os.environ | {"ROOTS": roots})
        assert self._first.stdout is not None
        if self._first.stdout.readline() != b"up\n":
            self.close()
            raise RuntimeError("namespaces without a first process; its words are on stderr")
        number = self._first.pid
        inner = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        self.number = int(inner[0]) if inner else number

    def close(self) -> None:
        self._first.kill()
        self._first.communicate()


class Machine(_Namespaces):
    """A machine: network, processes, /etc, /home, /srv, /run, /tmp and logs are its own.

    Args:
        folder: Where its files are.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = folder.name, folder
        for place in _OWN:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            if place == "etc":
                shutil.copytree("/etc", folder / "etc", symlinks=True)
            else:
                (folder / place).mkdir()
                (folder / place).chmod(0o1777 if place == "tmp" else 0o755)
        (folder / "var/log/nginx").mkdir()
        super().__init__(
            folder, _BOOT, *_OWN, kinds=("net", "mount", "uts", "pid", "fork", "kill-child", "mount-proc")
        )
        self.terminals: list[subprocess.Popen[bytes]] = []

    def close(self) -> None:
        """Cut the power."""
        super().close()
        for terminal in self.terminals:
            terminal.wait()

    def at(self, path: str) -> Path:
        """Return where a file of the machine is; ``~`` is the user's home."""
        return self._folder / path.replace("~", "/home/flexperts").lstrip("/")

    def write(self, path: str, content: str | bytes) -> None:
        """Write a file, which the user owns unless it is in /etc."""
        self.run(f"mkdir -p {Path(path).parent}", root=path.startswith("/etc"))
        self.at(path).write_bytes(content if isinstance(content, bytes) else content.encode())
        if not path.startswith("/etc"):
            self.run(f"chown -R flexperts: {path}".replace("~", "/home/flexperts"), root=True)

    def run(self, script: str, *, root: bool = False, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a script as the user or as root, in the home folder."""
        words = self._words(script, root=root)
        done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"{self.name}: {script}\n{done.stdout}{done.stderr}"
        return done

    def start(self, script: str) -> subprocess.Popen[bytes]:
        """Run a script as the user in a terminal that stays open."""
        with self._log(len(self.terminals)).open("wb") as log:
            one = subprocess.Popen(
                self._words(script), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.terminals.append(one)
        return one

    def end(self, terminal: int) -> None:
        """Close a terminal, and kill what runs in it."""
        os.killpg(self.terminals[terminal].pid, signal.SIGKILL)
        self.terminals[terminal].wait()

    def log(self, terminal: int) -> str:
        """Return what a terminal shows."""
        return self._log(terminal % len(self.terminals)).read_text(encoding="utf-8", errors="replace")

    def _log(self, terminal: int) -> Path:
        return self._folder / f"terminal-{terminal}.log"

    def _words(self, script: str, *, root: bool = False) -> list[str]:
        words = ["nsenter", f"--target={self.number}", "--net", "--mount", "--uts", "--pid"]
        if not root:
            words += ["setpriv", "--reuid=flexperts", "--regid=flexperts", "--init-groups"]
        package = Path(flexperts.__file__).parents[1]
        here = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root" if root else "/home/flexperts"}
        here |= {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
        return [*words, "env", "-i", *(f"{k}={v}" for k, v in here.items()), "bash", "-ec", f"cd\n{script}"]


class Machines:
    """A server and silos on a switch, which have followed the page up to the first run.

    Args:
        folder: Where everything is.
        silos: Name -> folder with train.jsonl and test.jsonl.
        base: The base's folder.
        family: Of the addresses by which silos know the server.
    """

    def __init__(self, folder: Path, silos: dict[str, Path], base: Path, family: socket.AddressFamily) -> None:
        self._rows, self._base, self._family, self._used = silos, base, family, 1
        folder.mkdir()
        with ExitStack() as opened:
            script = "ip link add name switch type bridge; ip link set switch up; echo up; exec sleep 1800"
            self._switch = _Namespaces(folder, script, kinds=("net",))
            opened.callback(self._switch.close)
            self.server = self._machine(folder / "server", opened)
            self.silos = {name: self._machine(folder / name, opened) for name in silos}
            self._open = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for machine in (self.server, *self.silos.values()):
                for number in range(len(machine.terminals)):
                    sys.stderr.write(f"--- {machine.name}, terminal {number}\n{machine.log(number)[-4000:]}\n")
        self._open.close()

    def follow(self) -> None:
        """Do what the page says up to the first run."""
        for title, text in blocks(1):
            self._do(self.server, title, text)
        for name, silo in self.silos.items():
            silo.run("useradd --create-home flexperts", root=True)
            silo.write("~/ca.crt", self.server.at("/srv/flexperts/ca.crt").read_bytes())
            for rows in self._rows[name].glob("*.jsonl"):
                silo.write(f"~/{rows.name}", rows.read_bytes())
            shutil.copytree(self._base, silo.at("~/base"))
            silo.run("chown -R flexperts: /home/flexperts/base", root=True)
            for title, text in blocks(2):
                if title == "server":
                    self.server.write("~/key.pub", silo.at("~/key.pub").read_bytes())
                if title == "silo.toml":
                    text = _filled_in(text, name)  # what a person would change
                self._do(self.server if title == "server" else silo, title, text)

    def plug(self, name: str, state: str) -> None:
        """Take a silo's cable out of the switch ("down"), or put it in again ("up")."""
        self._on_switch(f"ip link set {name} {state}")

    def _do(self, machine: Machine, title: str, text: str) -> None:
        if title.endswith(TERMINAL):
            started = machine.start(text)
            wait_until(
                lambda: started.poll() is not None or self._is_ready(machine, text), f"{machine.name}: {text}"
            )
            assert started.poll() is None, machine.log(-1)
        elif title.startswith(("/", "~", "silo.toml")):
            machine.write(title if title[0] in "/~" else f"~/{title}", text)
        else:
            assert title.removesuffix(", as root") in ("server", "silo"), title
            machine.run(text, root=title.endswith("as root"))

    def _is_ready(self, machine: Machine, text: str) -> bool:
        if machine is self.server:
            return machine.run("exec 3<>/dev/tcp/127.0.0.1/8000", check=False).returncode == 0
        return "silo serve" not in text or machine.at("~/state/worker.sock").exists()

    def _machine(self, folder: Path, opened: ExitStack) -> Machine:
        folder.mkdir()
        machine, name = Machine(folder), folder.name
        opened.callback(machine.close)
        number, self._used = self._used, self._used + 1
        self._on_switch(
            f"ip link add name {name} type veth peer name eth0 netns {machine.number};"
            f"ip link set {name} master switch up"
        )
        machine.run(
            f"ip link set eth0 up; ip addr add 10.27.0.{number}/24 dev eth0;"
            f"ip addr add fd27::{number}/64 dev eth0 nodad",
            root=True,
        )
        address = "fd27::1" if self._family == socket.AF_INET6 else "10.27.0.1"
        machine.at("/etc/hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{address} server.example\n")
        return machine

    def _on_switch(self, script: str) -> None:
        words = ["nsenter", f"--target={self._switch.number}", "--net", "sh", "-ec", script]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _filled_in(text: str, name: str) -> str:
    """Return the page's silo file with a silo's own values."""
    for theirs, ours in (
        ('"hospital"', f'"{name}"'),
        ('base = "Qwen/Qwen1.5-MoE-A2.7B"', 'device = "cpu"\ndtype = "float32"\nbase = "base"'),
    ):
        assert theirs in text
        text = text.replace(theirs, ours)
    return f"{text}\n[policy]\nmin_score_rows = 1\n"
