"""A server and a silo within the boundaries that their compose files describe: an attack, a run, then its model."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from flexperts.serving.http.keys import make_keys

from .cluster import BIN, Cluster, free_port, wait_until
from .containers import DEPLOY, as_its_user, image_of, sandboxed, services, user_of
from .strangers import assert_runs_as_ever, attack

pytestmark = [pytest.mark.deployment, pytest.mark.attacks, pytest.mark.timeout(900)]

STATE = "/var/lib/flexperts/worker"
REGISTER = ["flwr", "supernode", "register", "/dev/stdin", "mine"]


class Contained(Cluster):
    """A cluster in a network of its own, whose server and whose silo `clinic` run as the compose files say."""

    def __init__(self, folder: Path, rows: dict[str, Path], base: Path) -> None:
        self._network = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up && exec sleep 1200"])
        self.services: dict[str, dict[str, Any]] = {}
        super().__init__(folder, rows, base)
        self.port, self.through = 8000, 8443
        self._connection()
        self.runs = folder / "server" / "state" / "runs"
        for project in ("server", "silo"):
            (folder / project).mkdir()
        for name in ("ca.crt", "server.crt", "server.key"):
            self._place(folder / name, "server", 10000)
        (folder / "server" / "recipes").mkdir()
        self._place(folder / "ca.crt", "silo", 10002)
        shutil.copy(folder / "clinic" / "key", folder / "silo" / "supernode.key")
        os.chown(folder / "silo" / "supernode.key", 10002, -1)
        for name, source in (("rows", rows["clinic"]), ("base", base)):
            shutil.copytree(source, folder / "silo" / name)
            shell = f"chown -R 10001 {folder / 'silo' / name} && chmod -R go= {folder / 'silo' / name}"
            subprocess.run(["sh", "-c", shell], check=True)
        shipped = (DEPLOY / "silo.toml").read_text(encoding="utf-8")
        told = shipped.replace('"hospital"', '"clinic"\ndevice = "cpu"\ndtype = "float32"')
        (folder / "silo" / "silo.toml").write_text(f"{told}\n[policy]\nmin_score_rows = 1\n")
        settings = {"SILO": "clinic", "SUPERLINK": "localhost:8443", "ROWS": "./rows", "BASE": "./base"}
        self.services = services("compose.server.yaml", settings) | services("compose.silo.yaml", settings)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._network.kill()
        self._network.wait()

    def up(self, *names: str) -> None:
        """Start services, each when those before it are healthy."""
        for name in names:
            project = "server" if name in ("superlink", "proxy") else "silo"
            self._start(name, *sandboxed(self.services[name], self.folder / project))
            if image_of(self.services[name]).health and "healthcheck" not in self.services[name]:
                wait_until(lambda name=name: self.is_healthy(name), name)

    def is_healthy(self, name: str) -> bool:
        """Return what the service's health check says."""
        assert self.processes[name].poll() is None, self.log(name)
        return self.inside(name, *image_of(self.services[name]).health).returncode == 0

    def inside(self, name: str, *command: str, told: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command in a service's container, as `docker compose exec -T` does."""
        number = self.processes[name].pid
        inner = Path(f"/proc/{number}/task/{number}/children").read_text().partition(" ")[0]
        words = ["nsenter", f"--target={inner}", "--mount", "--net", "--pid", "--ipc", "--uts"]
        words += as_its_user(self.services[name], [*command])
        return subprocess.run(words, input=told, check=False, capture_output=True)

    def register(self) -> None:
        assert f"superlink {' '.join(REGISTER)} <key.pub" in (DEPLOY.parent / "docs" / "deploy.md").read_text()
        for key in sorted(self.folder.glob("*/key.pub")):
            done = self.inside("superlink", *REGISTER, told=key.read_bytes())
            assert done.returncode == 0, done.stdout + done.stderr

    def status_of(self, name: str, program: str) -> str:
        """Return what the kernel says of a service's process."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and program.encode() in (entry / "cmdline").read_bytes():
                status = (entry / "status").read_text()
                if f"Uid:\t{user_of(self.services[name])[0]}\t" in status:
                    return status
        raise AssertionError(f"{name} does not run {program}")

    def flwr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        words = [*self._here(), str(BIN / "flwr"), *arguments]
        return subprocess.run(words, env=self.environment, cwd=self.folder, capture_output=True, check=check)

    def start_superlink(self) -> None:
        self.up("superlink", "proxy")

    def _start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        enter, *words = self._here()
        found = shutil.which(command, path=self.environment["PATH"])
        return super()._start(name, enter, *words, str(found), *arguments)

    def _here(self) -> list[str]:
        return [str(shutil.which("nsenter")), f"--net=/proc/{self._network.pid}/ns/net"]

    def _place(self, file: Path, project: str, user: int) -> None:
        os.chown(shutil.copy(file, self.folder / project), user, -1)


@pytest.fixture
def tools(sandbox: None) -> None:
    """Skip where the boundaries cannot be made."""
    if os.getuid():
        pytest.skip("only root can run a container's processes as its users")
    if missing := [tool for tool in ("ip", "nginx", "nsenter", "setpriv", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")


@pytest.mark.usefixtures("tools")
def test_the_compose_files_keep_an_app_from_everything_and_a_run_ends_as_ever(
    tmp_path: Path, tiny_base: Path, rows: dict[str, Path], deployed: Callable[..., Path]
) -> None:
    recipe, folder = deployed(1), tmp_path / "cluster"
    folder.mkdir()
    lure = socket.create_server(("0.0.0.0", free_port()))
    with lure, Contained(folder, rows, tiny_base) as cluster:
        cluster.start_superlink()
        cluster.register()
        cluster.up("worker", "supernode", "apps")
        for name, program in (("worker", "silo\0serve"), ("supernode", "flower-supernode"), ("apps", "superexec")):
            status = cluster.status_of(name, program)
            assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
            assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
            assert "NoNewPrivs:\t1\n" in status

        state = folder / "silo" / "state" / "worker"
        secret = state / "personal.safetensors"
        secret.write_text("xylophone")
        inside = ["/etc/flexperts/silo.toml", "/srv/rows/train.jsonl", "/srv/base/config.json"]
        inside += [f"{STATE}/personal.safetensors", "/run/secrets/supernode.key", "/run/secrets/ca.crt"]
        told = {
            "nodes": 1,
            "files": [*inside, *(str(p) for p in (folder / "silo").rglob("*") if p.is_file()), "/etc/shadow"],
            "folders": [STATE, "/srv", "/srv/rows", "/etc/flexperts", "/run/secrets", "/var"],
            "needles": ["PRIVATE KEY", "xylophone"],
            "writes": ["/x", "/usr/x", "/var/tmp/x", "/run/flexperts/x", "/run/flexperts/ask/x", "/run/runtime/x"],
            "addresses": [("127.0.0.1", port) for port in (lure.getsockname()[1], 8000, 8443)],
            "socket": "/run/flexperts/ask/worker.sock",
            "abstract": "none",
            "processes": [one.pid for one in cluster.processes.values()],
        }
        seen = folder / "server" / "state" / "found.json"
        assert attack(cluster, told, out=seen, there="/var/lib/flexperts/found.json") == [{}]
        secret.unlink()

        cluster.start_silo("law_firm")
        assert_runs_as_ever(cluster, recipe, rows)
        (run,) = (path.name for path in (state / "runs").iterdir())
        assert list((state / "runs" / run / "personal").glob("clinic.safetensors"))
        assert not [path for path in (folder / "server").rglob("*") if "personal" in path.name]

        cluster.stop("proxy")  # its port; in containers each has one of its own
        for name in ("server.crt", "server.key"):
            os.chown(shutil.copy(folder / name, folder / "silo" / name.replace("server", "serve")), 10001, -1)
        make_keys(folder / "silo" / "keys.toml", {"clinic"})
        os.chown(folder / "silo" / "keys.toml", 10001, -1)
        served = cluster.services["serve"]
        served["command"] = served["command"].replace("flexperts serve ", f"flexperts serve {run}")
        cluster.up(
            "serve"
        )  # healthy: the personal model is loaded, from state that it cannot write and without rows
    assert not cluster.left
