"""The SuperNode as a stranger: what it runs can ask the worker's questions and reaches nothing else of the silo."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from typer.testing import CliRunner

import flexperts
from flexperts.cli.main import app
from flexperts.communication.messages import info_of, records
from flexperts.communication.wire import serialize
from flexperts.config.silo import SiloConfig, SiloSocket
from flexperts.deployment import listening, relay
from flexperts.deployment.request_log import RequestLog
from flexperts.deployment.units import write_server_units, write_units
from flexperts.engines.flower_private import stamp
from flexperts.engines.grid import InProcessGrid
from flexperts.errors import ArtifactError, ConfigError

from . import probe

OTHER, MEMBER = 65533, 65532
"""Ids of users that no test machine has."""
SECRET = "xylophone"
PACKAGE = Path(flexperts.__file__).parents[1]
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run a process as another user")


def open_to(folder: Path, *users: str, group: str | None = None) -> SiloSocket:
    return SiloSocket(path=str(folder / "ask" / "worker.sock"), group=group or str(own_group()), users=[*users])


def own_group() -> str:
    return grp.getgrgid(os.getgid()).gr_name


@contextmanager
def served(
    state: Path,
    door: SiloSocket,
    answer: Callable[[bytes | None], bytes],
    most: int = 1 << 30,
    called: Callable[[int, bool], None] = lambda user, may_ask: None,
) -> Iterator[None]:
    """Serve a shared socket from a thread until the block ends."""
    stop = threading.Event()

    def until_told(request: bytes | None) -> bytes:
        if stop.is_set():
            raise SystemExit
        return answer(request)

    def loop(listener: Listener) -> None:
        with suppress(OSError):  # the block has ended and closed it
            listening.serve_requests(listener, until_told, most, door, called)

    with listening.listening(state, door) as listener:
        threading.Thread(target=loop, args=(listener,), daemon=True).start()
        try:
            yield
        finally:
            stop.set()


ASK = """
import os, sys
from multiprocessing.connection import Client
user, groups = int(sys.argv[2]), [int(g) for g in sys.argv[3].split(",") if g]
if user != os.getuid():
    os.setgroups(groups); os.setgid(user); os.setuid(user)
try:
    with Client(sys.argv[1], family="AF_UNIX") as connection:
        connection.send_bytes(b"hello")
        print(connection.recv_bytes().decode())
except (OSError, EOFError) as error:
    print(type(error).__name__)
"""


DROPPED = ("EOFError", "ConnectionResetError", "BrokenPipeError")


def asked_by(user: int, door: SiloSocket, *groups: int) -> str:
    """Return what a process of a user gets from a socket."""
    words = [sys.executable, "-S", "-c", ASK, door.path, str(user), ",".join(map(str, groups))]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def open_path(path: Path) -> None:
    """Let every user reach a folder of pytest's, so that only what is tested is in their way."""
    for folder in (path, *path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)


@as_root
def test_only_the_named_user_gets_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    group, seen = 65500, []
    door = open_to(tmp_path, str(MEMBER), group=str(group))
    open_path(tmp_path)

    def note(request: bytes) -> bytes:
        seen.append(request)
        return b"answer"

    with served(tmp_path / "state", door, note):
        found = Path(door.path).stat()
        assert (found.st_mode & 0o777, found.st_gid) == (0o660, group)
        assert asked_by(MEMBER, door, group) == "answer"
        assert asked_by(OTHER, door, group) in DROPPED  # in the group, not named
        assert asked_by(OTHER, door) == "PermissionError"  # the file system is the first door
        assert asked_by(MEMBER, door) == "PermissionError"
        assert asked_by(0, door) in DROPPED  # nor root, unless named
        assert asked_by(MEMBER, door, group) == "answer"
    assert seen == [b"hello", b"hello"]
    refusals = [r.getMessage() for r in caplog.records if "is refused" in r.getMessage()]
    assert refusals == [f"a process of user {user} is refused: it is not in socket.users" for user in (OTHER, 0)]


@as_root
def test_a_number_from_another_user_namespace_is_not_believed(tmp_path: Path) -> None:
    """Containers with one map of users are known by their numbers; with a map of its own, any number can be had."""
    door = open_to(tmp_path, str(MEMBER), group=str(MEMBER))
    open_path(tmp_path)
    ask = [shutil.which("python3", path="/usr/bin") or sys.executable, "-S", "-c", ASK, door.path, str(MEMBER), ""]

    def asked(user: int, *mapped: str) -> subprocess.CompletedProcess[str]:
        words = ["setpriv", f"--reuid={user}", f"--regid={MEMBER}", "--clear-groups", *mapped, *ask]
        return subprocess.run(words, check=False, capture_output=True, text=True)

    as_member = ["unshare", "--user", f"--map-user={MEMBER}", f"--map-group={MEMBER}"]
    with served(tmp_path / "state", door, lambda _: b"answer"):
        if (found := asked(MEMBER, *as_member)).returncode:
            pytest.skip(f"no user namespaces here: {found.stderr}")
        assert found.stdout.strip() == "answer"
        assert asked(OTHER, *as_member).stdout.strip() in DROPPED
        assert asked(MEMBER).stdout.strip() == "answer"


def test_nothing_is_read_from_a_user_who_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[bytes] = []
    door = open_to(tmp_path, str(OTHER))
    with served(tmp_path / "state", door, lambda request: seen.append(request) or b"answer"):
        for _ in range(3):
            assert asked_by(os.getuid(), door) in DROPPED
    assert seen == []
    assert caplog.text.count(f"a process of user {os.getuid()} is refused") == 3


@as_root
def test_who_asks_is_on_record_and_who_may_not_too(tmp_path: Path) -> None:
    door, requests = open_to(tmp_path, str(MEMBER), group=str(MEMBER)), RequestLog(tmp_path / "state")
    open_path(tmp_path)
    seen = []

    def answer(request: bytes | None) -> bytes:
        seen.append(requests.user)
        return b"answer"

    with served(tmp_path / "state", door, answer, called=requests.called):
        assert asked_by(MEMBER, door, MEMBER) == "answer"
        for _ in range(2):
            assert asked_by(OTHER, door, MEMBER) in DROPPED
    assert seen == [MEMBER]
    refused = [json.loads(line) for line in requests.path.read_text().splitlines()]
    told = {(one["user"], one["outcome"], one["rule"], one["kind"], one["received"]) for one in refused}
    assert told == {(OTHER, "refused", "it is not in socket.users", None, None)}
    assert len(refused) == 2


def test_a_caller_that_drips_or_claims_too_much_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_LONGEST_TRANSFER", 0.5)
    door = open_to(tmp_path, pwd.getpwuid(os.getuid()).pw_name)
    with served(tmp_path / "state", door, lambda request: request), socket.socket(socket.AF_UNIX) as slow:
        slow.connect(door.path)
        ended = threading.Event()

        def drip() -> None:
            try:
                while not ended.wait(0.05):
                    slow.sendall(b"\0")
            except OSError:
                ended.set()

        slow.sendall(b"\x00\x10\x00\x00")
        threading.Thread(target=drip, daemon=True).start()
        with Client(door.path, family="AF_UNIX") as caller:
            caller.send_bytes(b"hello")
            assert caller.recv_bytes() == b"hello"
        ended.set()

    def too_much(*_: Any) -> bytes:
        raise MemoryError

    monkeypatch.setattr(listening.Listener, "accept", _accepting_once(too_much, listening.Listener.accept))
    with served(tmp_path / "state", door, lambda request: request):
        assert asked_by(os.getuid(), door) in DROPPED
        assert asked_by(os.getuid(), door) == "hello"


def test_no_more_is_read_than_the_policy_allows(tmp_path: Path) -> None:
    """A caller that sends on gets the reply, too; one that only claims so much does not have to send it."""
    most, seen = 1 << 20, list[int | None]()
    door = open_to(tmp_path, pwd.getpwuid(os.getuid()).pw_name)

    def answer(request: bytes | None) -> bytes:
        seen.append(None if request is None else len(request))
        return b"answer"

    with served(tmp_path / "state", door, answer, most):
        for size in (most, most + 1, 64 * most):
            assert relay._exchange(Path(door.path), bytes(size), shared=True) == b"answer"
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(door.path)
            caller.sendall(struct.pack("!iQ", -1, 1 << 40))
            assert caller.recv(99).endswith(b"answer")
    assert seen == [most, None, None, None]


def _accepting_once(receive: Callable[..., bytes], accept: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ``accept`` whose first connection cannot receive."""
    first = [True]

    def accepting(self: Any) -> Any:
        connection = accept(self)
        if first:
            first.clear()
            connection.recv_bytes = receive
        return connection

    return accepting


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_in_which_others_can_replace_the_socket_is_refused(tmp_path: Path, mode: int) -> None:
    door = open_to(tmp_path, "root")
    Path(door.path).parent.mkdir()
    Path(door.path).parent.chmod(mode)
    with pytest.raises(ArtifactError, match="chmod go-w"), listening.listening(tmp_path / "state", door):
        pass
    assert relayed(door.path) == "no worker answers; start `flexperts silo serve`"


@pytest.mark.parametrize("name", ["nobody-of-this-name", "4294967295", "-1", "99999999999", "²"])
def test_users_and_groups_must_exist(tmp_path: Path, name: str) -> None:
    door = open_to(tmp_path, name)
    with pytest.raises(ConfigError, match=r"no such user; create"), listening.listening(tmp_path / "s", door) as it:
        listening.serve_requests(it, lambda request: request, 1 << 30, door)
    door = open_to(tmp_path, "root", group=name)
    with pytest.raises(ConfigError, match=r"no such group; create"), listening.listening(tmp_path / "s", door):
        pass


def relayed(path: str) -> str:
    """Return the reason that Flower's ClientApp gives with a shared socket, or an empty text."""
    return str(info_of(through_app({"name": "clinic", "socket": path})).get("error", ""))


def through_app(config: dict[str, str]) -> RecordDict:
    """Return the answer of Flower's ClientApp to a message, with a SuperNode's configuration."""
    context = Context(run_id=1, node_id=1, node_config={**config}, state=RecordDict(), run_config={"recipe": ""})

    def answer(kind: str, content: RecordDict) -> RecordDict:
        message = Message(content, 1, kind)
        stamp(message)
        return relay.app(message=message, context=context).content

    grid = InProcessGrid({1: answer})
    (reply,) = grid.send_and_receive([grid.create_message(records({}), "train", 1, "")])
    return reply.content


def test_a_false_workers_socket_is_told_nothing(tmp_path: Path) -> None:
    """Another user who can write to the folder may have put its own socket there; so may a link lead elsewhere."""
    seen: list[bytes] = []
    door = open_to(tmp_path, pwd.getpwuid(os.getuid()).pw_name)

    def note(request: bytes) -> bytes:
        seen.append(request)
        return serialize({}, records({"client": "clinic"}))

    with served(tmp_path / "state", door, note):
        (tmp_path / "link.sock").symlink_to(door.path)
        assert relayed(str(tmp_path / "link.sock")).startswith("no worker answers")
        assert seen == []
        assert relayed(door.path) == ""
        assert len(seen) == 1


@as_root
def test_a_socket_of_another_user_than_the_folders_is_told_nothing(tmp_path: Path) -> None:
    door = open_to(tmp_path, "root")
    with served(tmp_path / "state", door, lambda _: serialize({}, records({"client": "clinic"}))):
        os.chown(door.path, OTHER, -1)
        assert relayed(door.path).startswith("no worker answers")
        os.chown(Path(door.path).parent, OTHER, -1)
        assert relayed(door.path) == ""


@pytest.mark.parametrize("error", [ValueError, MemoryError, RuntimeError, KeyError, RecursionError, UnicodeError])
def test_an_unforeseen_error_of_the_relay_leaves_as_its_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    """Flower sends the text of what a ClientApp raises, so it must raise nothing."""

    def fail(*_: Any, **__: Any) -> bytes:
        raise error(SECRET)

    for name in ("_exchange", "serialize", "deserialize"):
        with monkeypatch.context() as patch:
            patch.setattr(relay, "_exchange", lambda *_, **__: b"")
            patch.setattr(relay, name, fail)
            assert relayed(f"{tmp_path}/s") == f"{error.__name__}; see that silo's log"


@pytest.mark.parametrize(
    "config", [{"socket": "", "name": f"{SECRET}\x1b[2J/"}, {"silo": f"/{SECRET}"}, {"silo": "/proc/self/mem"}, {}]
)
def test_a_wrong_configuration_leaves_without_its_values(config: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--node-config") as caught:
        through_app(config)
    assert SECRET not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_silo_with_a_socket_is_not_read_by_its_supernode(tmp_path: Path) -> None:
    (tmp_path / "silo.toml").write_text('name = "a"\nstate = "s"\n[socket]\npath = "p"\n')
    with pytest.raises(ConfigError, match="set name and socket in --node-config"):
        through_app({"silo": str(tmp_path / "silo.toml")})


@pytest.fixture
def silo(tmp_path: Path) -> SiloConfig:
    """A silo whose rows, state and key hold a secret, and whose worker's socket can be opened by this user."""
    for name in ("rows/train.jsonl", "state/runs/personal.safetensors", "silo.toml", "supernode.key"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{SECRET} of {name}")
    (tmp_path / "state").chmod(0o700)
    return SiloConfig.model_validate(
        {
            "name": "clinic",
            "state": str(tmp_path / "state"),
            "base": "smol-moe",
            "data": {"train": str(tmp_path / "rows" / "train.jsonl")},
            "socket": open_to(tmp_path, pwd.getpwuid(os.getuid()).pw_name).model_dump(),
        }
    )


@pytest.mark.usefixtures("sandbox")
def test_an_app_in_the_sandbox_gets_an_answer_and_nothing_else(silo: SiloConfig, tmp_path: Path) -> None:
    assert silo.socket is not None
    write_units(tmp_path / "silo.toml", silo, "localhost:1", tmp_path / "units")
    script = tmp_path / "units" / "isolated-supernode"
    lure = socket.create_server(("0.0.0.0", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0{tmp_path}")
    abstract.listen()
    port = lure.getsockname()[1]
    files = [str(path) for path in tmp_path.rglob("*") if path.is_file()]
    told = {
        "files": [*files, "/etc/passwd", "/etc/shadow", str(Path.home())],
        "folders": [silo.state, f"{tmp_path}/rows", "/var", "/home"],
        "writes": ["/x", "/usr/x", "/var/tmp/x", f"{Path(silo.socket.path).parent}/x"],
        "socket": silo.socket.path,
        "needles": [SECRET],
        "addresses": [("127.0.0.1", port), ("::1", port), (own_address(), port), ("127.0.0.1", 22)],
        "abstract": str(tmp_path),
        "processes": [os.getpid(), os.getppid()],
    }
    with lure, abstract, served(tmp_path / "state", silo.socket, lambda request: b"answer to " + request):
        reached = probe.tried(told | {"writes": [], "socket": ""})  # the same code outside the sandbox
        expected = {f"read {path}" for path in files} | {f"list {silo.state}", f"list {tmp_path}/rows"}
        expected |= {f"connect 127.0.0.1 {port}", f"connect {own_address()} {port}", "abstract socket"}
        assert expected | {"follow links", f"signal {os.getpid()}"} <= reached.keys()

        def inside(*command: str, told: str = "") -> str:
            words = [script, "--try", *command]
            done = subprocess.run(words, input=told, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            return done.stdout

        found = inside(sys.executable, "-S", "-c", Path(probe.__file__).read_text(), told=json.dumps(told))
        assert json.loads(found) == {}
        assert (
            inside(sys.executable, "-S", "-c", ASK, silo.socket.path, str(os.getuid()), "") == "answer to hello\n"
        )
        seen = inside("env") + inside(
            "sh", "-c", "cat /proc/*/cmdline /proc/*/environ /proc/mounts 2>/dev/null; true"
        )
        assert SECRET not in seen
        assert "supernode.key" not in seen
        # the relay works there, with what a SuperNode's configuration says
        ask = (
            "from flexperts.deployment import relay; from pathlib import Path;"
            f"print(relay._exchange(Path({silo.socket.path!r}), b'hello', shared=True))"
        )
        assert inside("env", f"PYTHONPATH={PACKAGE}", sys.executable, "-c", ask) == "b'answer to hello'\n"


def own_address() -> str:
    """Return an address of this machine on its network, or loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probing:
        try:
            probing.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probing.getsockname()[0])


@as_root
def test_what_only_a_user_separates_is_not_read_by_another(silo: SiloConfig, tmp_path: Path) -> None:
    """Without any sandbox, the state folder is closed to other users by its mode."""
    open_path(tmp_path)
    (tmp_path / "state").chmod(0o700)
    code = f"import os; os.setgroups([]); os.setgid({OTHER}); os.setuid({OTHER}); os.listdir({silo.state!r})"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr


SERVE = """
import os, sys, flexperts.deployment.worker
from flexperts.cli.main import main
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
sys.argv = ["flexperts", "silo", "serve", sys.argv[1]]
main()
"""


@as_root
@pytest.mark.parametrize("closed", ["base/config.json", "base", "rows"])
def test_what_the_workers_user_cannot_open_is_named(tmp_path: Path, tiny_base: Path, closed: str) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").chmod(0o644)
    (tmp_path / "rows").mkdir()
    (tmp_path / "silo.toml").write_text(
        f'name = "a"\nstate = "{tmp_path}/rows/state"\nbase = "{tmp_path}/base"\n[data]\ntrain = "none.jsonl"\n'
    )
    open_path(tmp_path)
    os.chown(tmp_path / "rows", OTHER, OTHER)
    (tmp_path / closed).chmod(0)
    words = [sys.executable, "-c", SERVE, f"{tmp_path}/silo.toml", str(OTHER)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{tmp_path}/{closed}" in done.stderr


UNIT = re.compile(r"^(\w+)=(.*)$", re.MULTILINE)


def test_units_are_hardened(silo: SiloConfig, tmp_path: Path) -> None:
    written = write_units(tmp_path / "silo.toml", silo, "server.example:443", tmp_path / "units")
    texts = {path.name: path.read_text() for path in written}
    assert not [name for name, text in texts.items() if re.search(r"@[A-Z]+@", text)]
    services = {name: dict(UNIT.findall(text)) for name, text in texts.items() if name.endswith(".service")}
    assert services.keys() == {f"flexperts-{name}.service" for name in ("worker", "supernode", "serve@")}
    expected = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes"}
    for name, unit in services.items():
        assert expected | {"CapabilityBoundingSet": ""} == {
            k: unit[k] for k in (*expected, "CapabilityBoundingSet")
        }, name
    worker, node = services["flexperts-worker.service"], services["flexperts-supernode.service"]
    assert worker["User"] != node["User"] == silo.socket.users[0]  # type: ignore[union-attr]
    assert (worker["PrivateNetwork"], worker["RestrictAddressFamilies"]) == ("yes", "AF_UNIX")
    assert node["InaccessiblePaths"] == silo.state
    assert worker["ReadWritePaths"] == f"{silo.state} {tmp_path}/ask"
    assert "ReadWritePaths" not in services["flexperts-serve@.service"]
    filters = re.findall("^SystemCallFilter=(.*)", texts["flexperts-worker.service"], re.MULTILINE)
    assert filters[:2] == ["@system-service", "~@privileged"]  # what comes first makes it a list of what is allowed
    assert f'name="clinic" socket="{silo.socket.path}"' in texts["isolated-supernode"]  # type: ignore[union-attr]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_the_units_safe(silo: SiloConfig, tmp_path: Path) -> None:
    written = write_units(tmp_path / "silo.toml", silo, "server.example:443", tmp_path / "units")
    written += write_server_units(tmp_path / "server")
    units = [path for path in written if path.suffix == ".service"]
    assert len(units) == 4
    for unit in units:
        # bubblewrap needs some of what systemd counts; the sandbox is stricter, and has its own test
        most = "50" if "supernode" in unit.name else "20"
        words = ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", unit]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{unit.name}: {done.stdout[-200:]}"
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    complaints = [
        line for line in done.stderr.splitlines() if "flexperts-" in line and "is not executable" not in line
    ]
    assert complaints == []


def test_metrics_of_a_silo_are_in_a_folder_that_its_unit_may_write(silo: SiloConfig, tmp_path: Path) -> None:
    measured = silo.model_copy(update={"metrics": "/var/lib/metrics/clinic.prom"})
    write_units(tmp_path / "silo.toml", measured, "server.example:443", tmp_path / "units")
    text = (tmp_path / "units" / "flexperts-worker.service").read_text()
    assert f"ReadWritePaths={silo.state} {tmp_path}/ask /var/lib/metrics\n" in text


def test_the_command_for_the_server_writes_its_unit(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["server", "units", "--out", str(tmp_path / "units")])
    assert done.exit_code == 0, done.output
    texts = {path.name: path.read_text() for path in (tmp_path / "units").iterdir()}
    assert texts.keys() == {"flexperts-superlink.service", "flexperts-server.sysusers"}
    assert not [name for name, text in texts.items() if re.search(r"@[A-Z]+@", text)]
    unit = dict(UNIT.findall(texts["flexperts-superlink.service"]))
    assert (unit["NoNewPrivileges"], unit["ProtectSystem"], unit["UMask"]) == ("yes", "strict", "0077")
    assert "--host" not in texts["flexperts-superlink.service"]  # it listens on loopback
    assert f"u {unit['User']} -" in texts["flexperts-server.sysusers"]


def test_the_command_writes_the_units_and_check_names_who_may_ask(tmp_path: Path) -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    text = 'name = "clinic"\nstate = "state"\nbase = "smol-moe"\n[data]\ntrain = "none.jsonl"\n[socket]\n'
    file = tmp_path / "silo.toml"
    file.write_text(f'{text}path = "ask/worker.sock"\ngroup = "{own_group()}"\nusers = ["{user}"]\n')
    words = ["silo", "units", str(file), "--superlink", "server.example:443", "--out", str(tmp_path / "units")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"note: {file} is hidden by the units'" in done.output
    assert os.access(tmp_path / "units" / "isolated-supernode", os.X_OK)
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, ConfigError)
    assert "choose a new folder" in str(again.exception)
    checked = CliRunner().invoke(app, ["silo", "check", str(file)])
    assert f"{tmp_path}/ask/worker.sock: answers {user}, by group {own_group()}" in checked.output
    file.write_text(file.read_text().replace(f'["{user}"]', '["nobody-of-this-name"]'))
    assert "no such user" in str(CliRunner().invoke(app, ["silo", "check", str(file)]).exception)


@pytest.mark.parametrize(
    ("superlink", "change", "said"),
    [
        ("server.example", {}, "a port"),
        ("10.0.0.1:443", {}, "name in the SuperLink's certificate"),
        ("a b:1", {}, "a port"),
        ("x:1\nExecStart=/bin/sh", {}, "a port"),
        ("x:443", {"socket": None}, r"add \[socket\]"),
        ("x:443", {"state": "/a b/state"}, "a path in a unit"),
        ("x:443", {"state": "/a%h/state"}, "a path in a unit"),
    ],
)
def test_units_take_no_odd_value(
    silo: SiloConfig, tmp_path: Path, superlink: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        write_units(tmp_path / "silo.toml", silo.model_copy(update=change), superlink, tmp_path / "units")
    assert not (tmp_path / "units").exists()
