"""A SuperLink, SuperNodes and silo workers as real processes on loopback, to be started, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BIN = Path(sys.executable).parent
PATIENCE = 120.0
"""Seconds after which something that should have come has not."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(happened: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {patience:.0f} s")
        time.sleep(0.2)


def shell(folder: Path, script: str) -> None:
    subprocess.run(["bash", "-ec", script], cwd=folder, check=True, capture_output=True)


class Cluster:
    """Processes that share one folder and one SuperLink.

    Args:
        folder: Where everything lies; processes are recognised by it.
        silos: Name -> folder with train.jsonl and test.jsonl.
        base: The base folder.
        tls: TLS with a CA of its own and registered SuperNode keys, or neither.
        through: Port that SuperNodes connect to instead of the SuperLink's, such as a recording proxy's.
    """

    def __init__(self, folder: Path, silos: dict[str, Path], base: Path, *, tls: bool = True) -> None:
        self.folder, self.tls, self.port = folder, tls, free_port()
        self.through, self.host = self.port, "127.0.0.1"
        self.runs = folder / "runs"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.left: list[bytes] = []
        """Command lines that were still there a minute after everything was told to end."""
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flower"),
            "FLEXPERTS_RUNS": str(self.runs),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        (folder / "flower").mkdir()
        self._connection()
        if tls:
            self._certificates()
        self.silos = list(silos)
        for name, rows in silos.items():
            self._silo(name, rows, base)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # SuperNodes say goodbye to the SuperLink, so it goes last.
        for name in sorted(self.processes, key=lambda name: (name == "superlink", name)):
            self.stop(name)
        try:
            wait_until(lambda: not self.alive(), "the end of all processes", 60.0)
        except TimeoutError:
            self.left = [Path(f"/proc/{number}/cmdline").read_bytes() for number in self.alive()]
            for number in self.alive():
                os.kill(number, signal.SIGKILL)

    def start_superlink(self) -> None:
        secure = (
            "--ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth"
        )
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--database", "state.db"]
        self._start("superlink", "flower-superlink", *address, *(secure.split() if self.tls else ["--insecure"]))
        wait_until(lambda: self.flwr("supernode", "list", "here", check=False).returncode == 0, "the SuperLink")

    def start_worker(self, silo: str) -> None:
        self._start(f"worker-{silo}", "flexperts", "silo", "serve", f"{silo}/silo.toml")
        wait_until(lambda: (self.folder / silo / "state" / "worker.sock").exists(), f"the worker of {silo}")

    def start_node(self, silo: str, config: str | None = None) -> None:
        """Start a silo's SuperNode, as a supervisor would: again and again until the SuperLink takes it."""
        address = ["--superlink", f"{self.host}:{self.through}", "--host", "127.0.0.1", "--port", str(free_port())]
        secure = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", f"{silo}/key"]
        config = config or f'silo="{self.folder / silo / "silo.toml"}"'
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            arguments = [*address, *(secure if self.tls else ["--insecure"]), "--node-config", config]
            node = self._start(f"node-{silo}", "flower-supernode", *arguments)
            try:
                node.wait(8.0)
            except subprocess.TimeoutExpired:
                return
        raise TimeoutError(f"the SuperNode of {silo} is not taken")

    def start_silo(self, silo: str) -> None:
        self.start_worker(silo)
        self.start_node(silo)

    def start_everything(self) -> None:
        self.start_superlink()
        if self.tls:
            self.register()
        for silo in self.silos:
            self.start_silo(silo)

    def kill(self, name: str) -> None:
        """Kill a process with all its children, without a chance to say goodbye."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> None:
        """End a process as a service manager does."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def pause(self, name: str) -> None:
        """Let a process stand still."""
        os.killpg(self.processes[name].pid, signal.SIGSTOP)

    def submit(self, recipe: Path, out: str, *extra: str) -> subprocess.Popen[bytes]:
        """Start a run and the command that follows it."""
        arguments = ["run", str(recipe), "--engine", "superlink://here", "--out", out, *extra]
        return self._start(f"run-{out}-{len(self.processes)}", "flexperts", *arguments)

    def flwr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [BIN / "flwr", *arguments], env=self.environment, cwd=self.folder, capture_output=True, check=check
        )

    def rounds(self, out: str) -> list[dict[str, Any]]:
        path = self.runs / out / "rounds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def alive(self) -> list[int]:
        """Return all processes that were started with this cluster's environment, children of children too."""
        mark = f"FLWR_HOME={self.folder / 'flower'}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    running = mark in (entry / "environ").read_bytes().split(b"\0")
                    zombie = " Z " in (entry / "stat").read_text()
                except OSError:
                    continue
                if running and not zombie:
                    found.append(int(entry.name))
        return found

    def _start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [BIN / command, *arguments],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.processes[name]

    def _connection(self) -> None:
        trust = f'root-certificates = "{self.folder / "ca.crt"}"' if self.tls else "insecure = true"
        text = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        (self.folder / "flower" / "config.toml").write_text(text, encoding="utf-8")

    def _certificates(self) -> None:
        key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        shell(
            self.folder,
            f"""
            openssl req -x509 {key} -days 2 -keyout ca.key -out ca.crt -subj "/CN=test CA"
            openssl req {key} -keyout server.key -out server.csr -subj "/CN=localhost"
            openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out server.crt \
                -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1')
            """,
        )

    def _silo(self, name: str, rows: Path, base: Path) -> None:
        home = self.folder / name
        home.mkdir()
        data = f'[data]\ntrain = "{rows / "train.jsonl"}"\ntest = "{rows / "test.jsonl"}"\n'
        text = f'name = "{name}"\nstate = "state"\nbase = "{base}"\ndevice = "cpu"\ndtype = "float32"\n{data}'
        text += "[policy]\nmin_score_rows = 1\n"
        (home / "silo.toml").write_text(text, encoding="utf-8")
        if self.tls:
            shell(home, 'ssh-keygen -q -t ecdsa -b 384 -N "" -f key')

    def register(self) -> None:
        """Make the SuperNodes' keys known to the SuperLink."""
        for key in sorted(self.folder.glob("*/key.pub")):
            self.flwr("supernode", "register", str(key), "here")
