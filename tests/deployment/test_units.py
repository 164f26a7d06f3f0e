"""The units as docs/deploy.md installs them, under systemd in a container: an attack, then a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import flexperts

from .cluster import BIN, free_port, wait_until
from .strangers import PROBE, Strangers, assert_runs_as_ever, attack

pytestmark = [pytest.mark.deployment, pytest.mark.attacks, pytest.mark.timeout(900)]

STEPS = re.compile(r"```bash\n(/opt/flexperts/bin/flexperts silo units .*?)```", re.DOTALL)
DEPLOY = Path(__file__).parents[2] / "docs" / "deploy.md"
STATE, SOCKET = "/var/lib/flexperts/worker", "/run/flexperts/ask/worker.sock"
SILO = f"""
name = "clinic"
state = "{STATE}"
base = "/srv/base"
device = "cpu"
dtype = "float32"
[data]
train = "/srv/rows/train.jsonl"
test = "/srv/rows/test.jsonl"
[policy]
min_score_rows = 1
[socket]
path = "{SOCKET}"
group = "flexperts-ask"
users = ["flexperts-app"]
"""
CONTAINER = f"""
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mount -t overlay overlay -o lowerdir=layer:{sys.prefix} installed
exec systemd-nspawn --directory=/ --volatile=yes --register=no --keep-unit --console=read-only --resolv-conf=off \\
    --machine=flexperts --bind-ro="$PWD/installed:/opt/flexperts" --bind-ro={sys.base_prefix}:/opt/python "$@"
"""
CONTAINED = [str(shutil.which("unshare")), "--mount", "bash", "-ec", CONTAINER, "bash"]
"""A container with this machine's /usr, Python and network, and nothing else. Only it sees what is mounted."""
PREPARED = """
systemctl is-system-running --wait || true  # what it says depends on this machine's own units
echo /opt/python/lib >/etc/ld.so.conf && ldconfig  # a Python that was moved finds its library
# bubblewrap may mount a /proc only where the kernel finds one that hides nothing; the container's hides some files
mkdir /run/proc && mount -t proc -o nosuid,nodev,noexec proc /run/proc
echo 127.0.0.1 localhost >/etc/hosts
mkdir /etc/flexperts
echo xylophone >/root/secret
systemctl set-environment OMP_NUM_THREADS=1  # as the other processes of the cluster: the bits depend on it
"""


class Booted(Strangers):
    """A cluster whose first silo has a machine of its own."""

    def boot(self, rows: Path, base: Path) -> None:
        """Boot a container and put on it what an operator has before the steps; skip where there is none."""
        self._install()
        words = [*CONTAINED, "--as-pid2", "/usr/bin/true"]
        tried = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"no container starts here: {tried.stderr[-300:]}")
        boot = "systemd.unit=basic.target systemd.firstboot=no systemd.journald.forward_to_console=1"
        self._start("container", *CONTAINED, "--boot", *boot.split())
        wait_until(lambda: (self.root / "run" / "systemd" / "private").exists(), "systemd")
        self.inside(PREPARED)
        etc = self.root / "etc" / "flexperts"
        (etc / "silo.toml").write_text(SILO)
        shutil.copy(self.folder / "ca.crt", etc)
        shutil.copy(self.folder / "clinic" / "key", etc / "supernode.key")
        shutil.copy(PROBE, self.root / "root")
        shutil.copytree(rows, self.root / "srv" / "rows")
        shutil.copytree(base, self.root / "srv" / "base")
        (self.root / "srv" / "base" / "model.safetensors").chmod(0o644)

    @property
    def root(self) -> Path:
        """The container's root folder, as its first process has it."""
        return Path(f"/proc/{self._leader()}/root")

    def inside(self, script: str, told: str = "") -> str:
        """Run a script as the container's root and return what it says."""
        words = ["nsenter", f"--target={self._leader()}", "--mount", "--pid", "bash", "-euc", script]
        clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(words, input=told, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def process(self, unit: str) -> Path:
        """The main process of a unit."""
        return self.root / "proc" / self.inside(f"systemctl show -P MainPID {unit}").strip()

    def _leader(self) -> str:
        number = self.processes["container"].pid
        return Path(f"/proc/{number}/task/{number}/children").read_text().partition(" ")[0] or "none"

    def _install(self) -> None:
        """Write what differs between this virtual environment and one in /opt/flexperts."""
        layer = self.folder / "layer"
        packages = layer / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        shutil.copytree(Path(flexperts.__file__).parent, packages / "flexperts")
        (layer / "bin").mkdir()
        (self.folder / "installed").mkdir()
        (layer / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
        for name in ("python", "python3"):
            (layer / "bin" / name).symlink_to(f"/opt/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}")
        for script in BIN.glob("fl*"):
            copied = Path(shutil.copy(script, layer / "bin"))
            copied.write_text(script.read_text().replace(str(BIN), "/opt/flexperts/bin"))


@pytest.fixture
def container(sandbox: None) -> None:
    """Skip where no container can be booted."""
    if os.getuid():
        pytest.skip("only root can boot a container")
    if tools := [tool for tool in ("systemd-nspawn", "nsenter", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(tools)} not installed")


@pytest.mark.usefixtures("container")
def test_the_units_keep_an_app_from_everything(
    tmp_path: Path, tiny_base: Path, rows: dict[str, Path], deployed: Callable[..., Path]
) -> None:
    recipe, folder = deployed(1), tmp_path / "cluster"
    folder.mkdir()
    lure = socket.create_server(("0.0.0.0", free_port()))
    with lure, Booted(folder, rows, tiny_base) as cluster:
        cluster.boot(rows["clinic"], tiny_base)
        cluster.start_superlink()
        cluster.register()
        steps = STEPS.search(DEPLOY.read_text(encoding="utf-8"))
        assert steps is not None
        cluster.inside(steps[1].replace("server.example:443", f"localhost:{cluster.port}"))
        wait_until((cluster.root / SOCKET[1:]).exists, "the worker")
        secret = cluster.root / STATE[1:] / "personal.safetensors"
        secret.write_text("xylophone")

        worker, node = cluster.process("flexperts-worker"), cluster.process("flexperts-supernode")
        for process in (worker, node):
            status = (process / "status").read_text()
            assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
            assert "NoNewPrivs:\t1\n" in status
            assert "Seccomp:\t2\n" in status
            assert not os.access(process / "root" / "etc", os.W_OK)
            assert not (process / "root" / "root" / "secret").exists()
            assert (process / "root" / "etc" / "hosts").exists()
        assert (worker / "root" / str(secret.relative_to(cluster.root))).exists()
        assert not (node / "root" / str(secret.relative_to(cluster.root))).exists()

        here = ["/etc/flexperts/silo.toml", "/etc/flexperts/supernode.key", "/srv/rows/train.jsonl", "/etc/shadow"]
        here += ["/root/secret", f"{STATE}/personal.safetensors"]
        told = {
            "nodes": 1,
            "files": [*here, "/run/key", "/run/credentials/flexperts-supernode.service/supernode.key"],
            "folders": [STATE, "/srv", "/srv/rows", "/etc/flexperts", "/run/credentials", "/var"],
            "needles": ["PRIVATE KEY", "xylophone"],
            "writes": ["/x", "/usr/x", "/var/tmp/x", f"{Path(SOCKET).parent}/x"],
            "addresses": [("127.0.0.1", lure.getsockname()[1]), ("127.0.0.1", cluster.port), ("127.0.0.1", 9092)],
            "socket": SOCKET,
            "abstract": "none",
            "processes": [],
        }
        outside = json.dumps(told | {"writes": [], "socket": ""})
        reached = json.loads(cluster.inside("/opt/flexperts/bin/python -S /root/probe.py", outside))
        assert {f"connect 127.0.0.1 {lure.getsockname()[1]}", *(f"read {path}" for path in here)} <= reached.keys()
        assert attack(cluster, told) == [{}]
        for name in ("flexperts", "flower-supernode", "flower-superexec"):  # loopback is all the network they have
            number = f"$(pgrep -f '^/opt/flexperts/bin/python .*bin/{name}')"
            assert cluster.inside(f"grep -c : /proc/{number}/net/dev") == "1\n"
        secret.unlink()

        cluster.start_silo("law_firm")
        assert_runs_as_ever(cluster, recipe, rows)
        assert list(secret.parent.glob("runs/*/*.safetensors"))
        assert cluster.inside("systemctl show -P NRestarts flexperts-worker") == "0\n"
    assert not cluster.left
