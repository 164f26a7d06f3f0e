"""Work that is stopped ends with one line: what is kept, where, and the command that goes on, which does."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from flexperts.artifacts import RunDirectory
from flexperts.cli.interrupted import command_line, standing, stoppable
from flexperts.data.silos.generate import write_silos
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import save_server, saved_round

pytestmark = pytest.mark.faults  # each starts commands and stops them: minutes together
PROGRAM = str(Path(sys.executable).with_name("flexperts"))
RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[data.silos]
train_rows = 8
test_rows = 4
[training]
max_length = 640
local_steps = 1
[federation]
rounds = 60
[evaluation]
max_new_tokens = 2
rows = 1
"""


@pytest.fixture
def work(tmp_path: Path, tiny_base: Path) -> Path:
    folder = tmp_path / "a place"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(base=tiny_base))
    return folder


def started(work: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PROGRAM, *arguments],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not there():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def stop(process: subprocess.Popen[str], number: signal.Signals, *, all_of_them: bool = False) -> str:
    """Stop a command and return its one line."""
    os.killpg(process.pid, number) if all_of_them else os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert [line[:9] for line in lines] == ["stopped: "], err
    (line,) = lines
    return line


def again(line: str) -> list[str]:
    """Return the command that a line names."""
    program, *arguments = shlex.split(line.partition("resume with ")[2])
    assert program == "flexperts"
    return arguments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(work: Path, number: signal.Signals) -> None:
    out = work / "runs" / "first run"
    process = started(work, "run", "recipe.toml", "--out", "runs/first run", "--set", "training.lr=1e-3")
    wait_for(lambda: RunDirectory(out).written_rounds() >= 2, process)
    line = stop(process, number)
    done = saved_round(RunDirectory(out).checkpoint)
    assert f"{done} of 60 rounds of flex finished, kept in runs/first run" in line
    expected = ["run", "recipe.toml", "--set", "training.lr=1e-3", "--out", "runs/first run", "--resume"]
    assert again(line) == expected
    fewer = subprocess.run(
        [PROGRAM, *again(line), "--set", f"federation.rounds={done + 1}"],
        cwd=work, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip
    assert fewer.returncode == 0, fewer.stderr
    assert "everything goes to runs/first run" in fewer.stdout
    assert re.search(rf"note: flex: {done} of 60 planned rounds are finished", fewer.stdout)
    assert [record["number"] for record in RunDirectory(out).rounds()] == [*range(1, done + 2)]


def test_a_run_that_is_stopped_while_it_loads_keeps_nothing(work: Path) -> None:
    process = started(work, "run", "recipe.toml", "--out", "run")
    wait_for(lambda: (work / "run").exists(), process)  # the lock is held: rows and base are loading
    assert not (work / "run" / "config.toml").exists()
    assert "nothing is kept" in stop(process, signal.SIGTERM)
    assert not (work / "run").exists()


def test_a_killed_run_goes_on_at_once(work: Path) -> None:
    recipe = work / "recipe.toml"  # long enough for a second process to start, on a busy machine too
    recipe.write_text(recipe.read_text().replace("rounds = 60", "rounds = 3000"))
    process = started(work, "run", "recipe.toml", "--out", "run")
    wait_for(lambda: RunDirectory(work / "run").written_rounds() >= 1, process)
    second = subprocess.run(
        [PROGRAM, "run", "recipe.toml", "--out", "run", "--resume"],
        cwd=work, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip
    assert second.returncode == 2
    assert second.stderr.startswith(f"error: run: process {process.pid} on ")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    third = started(work, "run", "recipe.toml", "--out", "run", "--resume")
    rounds = RunDirectory(work / "run").written_rounds()
    wait_for(lambda: RunDirectory(work / "run").written_rounds() > rounds, third)
    stop(third, signal.SIGINT)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stopped_comparison_says_how_to_go_on(work: Path, workers: str) -> None:
    """Ctrl-C of a terminal reaches the workers too; none of them leaves a traceback, or goes on."""
    process = started(
        work, "compare", "recipe.toml", "--methods", "fedavg,local", "--seeds", "1", "--workers", workers
    )
    runs = work / "runs" / "recipe" / "runs"
    wait_for(
        lambda: any(RunDirectory(p.parent).written_rounds() for p in runs.glob("*/seed-0/config.toml")), process
    )
    line = stop(process, signal.SIGINT, all_of_them=True)
    assert "0 of 2 runs are finished, kept in runs/recipe" in line
    assert again(line)[:6] == ["compare", "recipe.toml", "--methods", "fedavg,local", "--seeds", "1"]
    written = {p: p.read_bytes() for p in runs.glob("*/seed-0/rounds.jsonl")}
    time.sleep(2)
    assert {p: p.read_bytes() for p in runs.glob("*/seed-0/rounds.jsonl")} == written


def test_a_run_that_breaks_off_offers_what_is_kept(work: Path) -> None:
    """The disk is full when the first checkpoints are written; a refusal before that offers nothing."""
    code = (
        "import resource, sys\n"
        "import flexperts.terminal.display, flexperts.engines.run, flexperts.tracking\n"
        "from flexperts.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "recipe.toml", "--out", "run"],
        cwd=work, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "it cannot be written" in line
    assert again(line) == ["run", "recipe.toml", "--out", "run", "--resume"]
    refused = subprocess.run(
        [PROGRAM, "run", "recipe.toml", "--out", "other", "--set", "lora.projections=['none']"],
        cwd=work, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "--resume" not in refused.stderr
    assert not (work / "other").exists()


def test_a_stopped_join_leaves_nobody(work: Path) -> None:
    write_silos(work / "silos", 0, 8, 4)
    few = ["--set", "federation.rounds=1"]
    made = subprocess.run(
        [PROGRAM, "run", "recipe.toml", "--out", "run", *few], cwd=work, capture_output=True, check=False
    )
    assert made.returncode == 0
    data = ["--data", "silos/shop/train.jsonl", "--name", "late", "--steps", "100000"]
    process = started(work, "join", "run", *data)
    wait_for(lambda: (work / "run" / "joined" / "late.part").exists(), process)
    second = subprocess.run([PROGRAM, "join", "run", *data], cwd=work, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"process {process.pid} on" in " ".join(second.stderr.split())
    assert "the silo has not joined" in stop(process, signal.SIGINT)
    assert RunDirectory(work / "run").joined() == {}


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [
        (("run", "my recipe.toml"), [("--out", Path("a b"))], "run 'my recipe.toml' --out 'a b'"),
        (
            ("run", "r"),
            [("--set", "data.clients={}"), ("--resume", True)],
            "run r --set 'data.clients={}' --resume",
        ),
        (
            ("compare", "r"),
            [("--seeds", None), ("--keep-weights", False), ("--workers", 2)],
            "compare r --workers 2",
        ),
    ],
)
def test_a_command_can_be_pasted(words: tuple[str, ...], options: list[tuple[str, object]], expected: str) -> None:
    line = command_line(*words, options=options)
    assert line == f"flexperts {expected}"
    assert shlex.split(line)[: 1 + len(words)] == ["flexperts", *words]


def test_what_stands_is_counted_for_the_reference_too(tmp_path: Path) -> None:
    assert "nothing is kept" in standing(tmp_path / "run", "again")
    text = "[data]\nsilos = {}\n[federation]\nrounds = 3\n[method]\nname = 'flex'\n"
    run = RunDirectory.create(tmp_path / "run", text)
    assert standing(run.path, "again") == f"0 of 3 rounds of flex finished, kept in {run.path}; resume with again"
    run.append_round({"number": 1})
    assert standing(run.path, "again").startswith("0 of 3")  # as it is resumed: the checkpoint counts
    save_server(run.checkpoint, Server(Payload.empty(), {"clinic": 1}, round=1))
    RunDirectory.create(run.reference, text.replace("flex", "fedavg"))
    said = standing(run.path, "again")
    assert said.startswith("1 of 3 rounds of flex and 0 of 3 rounds of fedavg finished, kept in ")
    assert json.loads((run.path / "rounds.jsonl").read_text())["number"] == 1


def test_signals_are_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(lambda: "never"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(typer.Exit) as ended, stoppable(lambda: "this is kept"):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "stopped: this is kept\n"
    assert signal.getsignal(signal.SIGTERM) is before
