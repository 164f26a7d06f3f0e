"""The socket: one worker per state folder, bytes only, and callers that misbehave harm nobody."""

from __future__ import annotations

import logging
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from flexperts.communication import wire
from flexperts.deployment import listening, relay, worker
from flexperts.errors import ArtifactError

from .asking import say, serving


def echo(request: bytes | None) -> bytes:
    return b"echo " + (request or b"")


def raw(state: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(state / "worker.sock"))
    return connection


def test_a_request_gets_its_reply(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(state, echo):
        assert say(state, b"hello") == b"echo hello"
        large = bytes(range(256)) * 40_000
        assert say(state, large) == b"echo " + large
    assert not (state / "worker.sock").exists()


def test_callers_that_hang_up_do_not_stop_the_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tmp_path / "state"
    caplog.set_level(logging.WARNING)
    with serving(state, lambda request: echo(request) * 100_000):
        raw(state).close()  # says nothing
        with raw(state) as caller:
            caller.sendall(struct.pack("!i", 1000) + b"half of it")
        with raw(state) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\n\r\n")  # a length of a gigabyte, and then nothing
        with raw(state) as caller:
            caller.sendall(struct.pack("!i", -1) + struct.pack("!Q", 1 << 62) + b"x")
        with Client(str(state / "worker.sock"), family="AF_UNIX") as caller:
            caller.send_bytes(b"gone before the reply")
        assert say(state, b"hello") == b"echo hello" * 100_000
    assert caplog.text.count("a connection was closed early") >= 4


def test_a_caller_that_stalls_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PATIENCE", 1)
    state = tmp_path / "state"
    with serving(state, echo), raw(state) as silent:
        silent.sendall(b"\0")
        assert say(state, b"hello") == b"echo hello"


def test_a_second_worker_on_one_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert not (state.exists() and listening.is_served(state))
    with serving(state, echo):
        assert listening.is_served(state)
        with pytest.raises(ArtifactError, match="another worker serves it"), listening.listening(state):
            pass
        assert say(state, b"hello") == b"echo hello"
    assert not listening.is_served(state)


def test_what_a_killed_worker_leaves_is_removed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    code = (
        "import os, sys; from pathlib import Path; from flexperts.deployment.listening import listening\n"
        "with listening(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, state], check=False).returncode == -9
    assert (state / "worker.sock").is_socket()
    with pytest.raises(ConnectionRefusedError):
        say(state, b"hello")
    with serving(state, echo):
        assert say(state, b"hello") == b"echo hello"


def test_nothing_of_the_door_pickles() -> None:
    """`send` and `recv` of a connection pickle; only their siblings for bytes may be used."""
    for module in (listening, relay, worker, wire):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert ".send(" not in source
        assert ".recv(" not in source
        assert "pickle" not in source.replace("Nothing is pickled", "")
