"""`flexperts silo`: as a process that is started, asked, killed; and the commands beside it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import RecordDict
from typer.testing import CliRunner

from flexperts.cli.main import app
from flexperts.communication.messages import info_of
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.deployment.listening import listening
from flexperts.errors import ArtifactError, DataError, FederationError

from .asking import RUN, converse, say

PROGRAM = Path(sys.executable).with_name("flexperts")


def started(silo_file: Path, log: Path, *program: str | Path) -> subprocess.Popen[bytes]:
    """Start a worker and wait until it serves."""
    before = log.read_text().count("serving") if log.exists() else 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    with log.open("ab") as file:
        command = [*(program or [PROGRAM]), "silo", "serve", silo_file]
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    end = time.monotonic() + 120
    while log.read_text().count("serving") == before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert process.poll() is None, log.read_text()
    return process


def test_a_worker_process_from_start_to_end(
    silo_file: Path, handed: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Killed in between: what it left is no hindrance, and the next one goes on with the personal state."""
    recipe, state, log = handed().to_toml(), tmp_path / "state", tmp_path / "log"

    def ask(kind: str, content: RecordDict) -> RecordDict:
        answer = say(state, serialize({"kind": kind, "run": RUN, "recipe": recipe}, content))
        assert answer is not None
        fields, reply = deserialize(answer)
        assert fields == {}
        return reply

    process = started(silo_file, log)
    try:
        answers = converse(ask)
        assert info_of(answers["evaluate"])["client"] == "clinic"
        second = subprocess.run([PROGRAM, "silo", "serve", silo_file], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "another worker serves it" in " ".join(second.stderr.split())
        process.kill()
        process.wait(timeout=60)
        assert (state / "worker.sock").is_socket()
        process = started(silo_file, log)
        assert str(converse(ask)) == str(answers)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait(timeout=60)
    assert not (state / "worker.sock").exists()
    assert log.read_text().count("base loaded") == 2  # two processes, ten messages
    assert "run 01234567, round 1: trained" in log.read_text()
    assert "Traceback" not in log.read_text()
    modes = {path: path.stat().st_mode & 0o077 for path in [state, *state.rglob("*")]}
    assert state / "runs" / RUN / "personal" / "clinic.safetensors" in modes
    assert set(modes.values()) == {0}


STUB = """
import sys, types
class Worker:
    def __init__(self, *_): self.requests = types.SimpleNamespace(called=lambda *_: None)
    def reply(self, request): return request
sys.modules["flexperts.deployment.worker"] = types.SimpleNamespace(Worker=Worker)
from flexperts.cli.main import main
main()
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_ends_cleanly_when_it_is_stopped(silo_file: Path, tmp_path: Path, stop: signal.Signals) -> None:
    process = started(silo_file, tmp_path / "log", sys.executable, "-c", STUB)
    assert say(tmp_path / "state", b"hello") == b"hello"
    process.send_signal(stop)
    assert process.wait(timeout=60) == 0
    assert not (tmp_path / "state" / "worker.sock").exists()
    assert "Traceback" not in (tmp_path / "log").read_text()


def call(*arguments: object, answer: str = "") -> str:
    return CliRunner().invoke(app, ["silo", *map(str, arguments)], input=answer, catch_exceptions=False).output


def test_check_counts_rows_and_looks_at_the_state_folder(silo_file: Path, tmp_path: Path) -> None:
    said = call("check", silo_file)
    assert "clinic: 8 train rows, 4 test rows" in said
    assert "will be created" in said
    assert "no worker serves it now" in said
    assert not (tmp_path / "state").exists()
    with listening(tmp_path / "state"):
        assert "\na worker serves it" in call("check", silo_file)
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(ArtifactError, match="chmod 700"):
        call("check", silo_file)


def test_check_loads_no_base(silo_file: Path) -> None:
    code = f"""
import sys
from flexperts.client import workspace
workspace.load_base = lambda *_: sys.exit("the base was loaded")
sys.argv = ["flexperts", "silo", "check", {str(silo_file)!r}]
from flexperts.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "8 train rows" in done.stdout
    assert "the base was loaded" not in done.stderr


def test_check_refuses_rows_that_cannot_be_read(silo_file: Path) -> None:
    silo_file.write_text(re.sub(r'train = ".*"', 'train = "none.jsonl"', silo_file.read_text()))
    with pytest.raises(DataError, match="no such data file"):
        call("check", silo_file)


def test_check_tells_all_that_is_wrong(silo_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.csv").write_text('instruction,response\nq,"private\nq,a\n')
    (tmp_path / "test.jsonl").write_text('{"instruction": "q"}\n{"instruction": "private", "response": ""}\n')
    (tmp_path / "state").mkdir(mode=0o755)
    text = re.sub(r'train = ".*"', 'train = "train.csv"', silo_file.read_text())
    silo_file.write_text(re.sub(r'test = ".*"', 'test = "test.jsonl"', text))
    done = subprocess.run([PROGRAM, "silo", "check", silo_file], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    first, second, third = done.stderr.splitlines()
    assert first.startswith(f"error: clinic: {tmp_path / 'train.csv'}, line 2: a quote opens a cell here")
    assert second.startswith(
        f"error: clinic: {tmp_path / 'test.jsonl'}: 2 of 2 rows cannot be used: line 1, row 1: no"
    )
    assert third.startswith("error: ")
    assert "chmod 700" in third
    assert "private" not in done.stdout + done.stderr


def test_check_says_what_surprises(silo_file: Path, tmp_path: Path) -> None:
    rows = "".join(f"q{i},c{i},{i},\n" for i in range(9))
    (tmp_path / "train.csv").write_text(f"instruction,input,output,id\n{rows}q,c,,\n")
    text = re.sub(r'train = ".*"', 'train = "train.csv"\non_bad_row = "drop"', silo_file.read_text())
    silo_file.write_text(re.sub(r"test = .*", "", text))
    said = call("check", silo_file).splitlines()
    path = tmp_path / "train.csv"
    assert said[:3] == [
        f"note: clinic: {path}: "
        "1 of 10 rows are left out (data.on_bad_row = 'drop'): line 11, row 10: output is empty",
        f"note: clinic: {path}: context is read from 'input', response is read from 'output'; unused columns: 'id'",
        "clinic: 7 train rows, 2 test rows; all fit 512 tokens",
    ]


def test_check_refuses_what_no_run_could_divide(silo_file: Path, tmp_path: Path) -> None:
    text = silo_file.read_text()
    train = re.findall(r'train = "(.*)"', text)[0]
    silo_file.write_text(re.sub(r'test = ".*"', f'test = "{train}"', text))
    with pytest.raises(DataError, match="are in train and in test"):
        call("check", silo_file)


def test_runs_are_listed_and_forgotten(silo_file: Path, handed: Callable[..., RunConfig], tmp_path: Path) -> None:
    assert "last round" in call("runs", silo_file)
    folder = tmp_path / "state" / "runs" / RUN
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(handed("method.name=fedprox").to_toml())
    said = call("runs", silo_file)
    assert RUN in said
    assert "fedprox" in said
    assert "Aborted" in call("forget", silo_file, RUN, answer="n\n")
    assert folder.exists()
    for wrong in ("../../x", "1" * 31):
        with pytest.raises(FederationError, match="32 digits"):
            call("forget", silo_file, wrong, "--yes")
    assert "forgotten" in call("forget", silo_file, RUN, "--yes")
    assert not folder.exists()
    with pytest.raises(ArtifactError):
        call("forget", silo_file, RUN, "--yes")
