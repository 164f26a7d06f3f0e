"""`flexperts status` says where a run is: from its files, while a process writes them and later."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from flexperts.artifacts import RunDirectory
from flexperts.cli.main import app
from flexperts.config.run import RunConfig
from flexperts.errors import ArtifactError, ConfigError
from flexperts.files import json_text, sealed, sole_writer, writer
from flexperts.server.round_log import RoundLog

NONE = dict.fromkeys(("drawn", "used", "missing", "refused"), 0) | {
    "last_used": None,
    "loss": None,
    "late": False,
    "refusal": None,
}
RECIPE = "[data.silos]\n[federation]\nrounds = 3\n"


def log(number: int, used: dict[str, float], **more: Any) -> RoundLog:
    return RoundLog(
        number,
        clients={name: {"loss": loss, "rows": 4} for name, loss in used.items()},
        uplink=dict.fromkeys(used, 1000),
        downlink={"a": 500, "b": 500},
        seconds={"training": 60.0, "evaluation": 4.0},
        participants=["a", "b"],
        planned=3,
        **more,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two of three rounds: in the second one, b is missing and noise was added."""
    made = RunDirectory.create(tmp_path / "mine", RECIPE)
    made.append_round(vars(log(1, {"a": 1.0, "b": 3.0})))
    privacy = {"epsilon": 2.5, "delta": 1e-5}
    made.append_round(vars(log(2, {"a": 0.5}, missing=["b"], refused={"c": "no such silo"}, privacy=privacy)))
    return made


def told(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, ["status", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.output)


def test_the_value_counts_rounds_silos_bytes_and_epsilon(run: RunDirectory) -> None:
    found = told(run.path)
    assert (found["run"], found["method"], found["state"], found["writer"]) == ("mine", "flex", "stopped", None)
    assert found["rounds"] == {"done": 2, "planned": 3}
    assert found["bytes"] == {"uplink": 3000, "downlink": 2000}
    assert found["epsilon"] == 2.5
    assert 0 <= found["seconds_since"] < 60
    assert found["silos"] == {
        "a": NONE | {"drawn": 2, "used": 2, "last_used": 2, "loss": 0.5},
        "b": NONE | {"drawn": 2, "used": 1, "missing": 1, "last_used": 1, "loss": 3.0, "late": True},
        "c": NONE | {"refused": 1, "refusal": "no such silo"},
    }
    assert [(one["number"], one["used"], one["drawn"], one["loss"]) for one in found["last_rounds"]] == [
        (1, 2, 2, 2.0),
        (2, 1, 2, 0.5),
    ]


def test_a_line_and_tables_say_the_same(run: RunDirectory) -> None:
    shown = CliRunner().invoke(app, ["status", str(run.path)], env={"COLUMNS": "160"}).output
    assert "mine, flex: stopped; 2 of 3 rounds; a round takes 0:01:04; the last one ended 0:00:0" in shown
    assert "missing in their last round: b" in shown
    assert "1 of 2" in shown


def test_a_line_that_is_being_written_is_not_counted(run: RunDirectory) -> None:
    with (run.path / "rounds.jsonl").open("a") as lines:
        lines.write(json_text(sealed(vars(log(3, {"a": 0.1}))))[:100])
    assert told(run.path)["rounds"]["done"] == 2


def test_a_run_without_rounds_has_no_tables(tmp_path: Path) -> None:
    made = RunDirectory.create(tmp_path / "new", RECIPE)
    found = told(made.path)
    assert (found["rounds"], found["seconds_since"], found["silos"]) == ({"done": 0, "planned": 3}, None, {})
    assert "new, flex: stopped; 0 of 3 rounds" in CliRunner().invoke(app, ["status", str(made.path)]).output


def test_a_deployed_run_is_found_by_its_name(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXPERTS_RUNS", str(run.path.parent))
    assert told("mine")["rounds"]["done"] == 2
    with pytest.raises(ArtifactError, match="holds no run"):
        CliRunner().invoke(app, ["status", "yours"], catch_exceptions=False)


@pytest.fixture
def busy(run: RunDirectory) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that writes the run."""
    code = f"""
import time
from pathlib import Path
from flexperts.files import sole_writer
with sole_writer(Path({str(run.path)!r})):
    print("writes", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writes\n"
        yield process
        process.kill()


def test_a_run_is_running_while_its_process_lives_and_stopped_when_it_was_killed(
    run: RunDirectory, busy: subprocess.Popen[bytes]
) -> None:
    assert told(run.path)["state"] == "running"
    assert f"process {busy.pid} on " in told(run.path)["writer"]
    busy.send_signal(signal.SIGKILL)
    busy.wait()
    assert (run.path / ".lock").exists()
    assert told(run.path)["state"] == "stopped"


def test_looking_does_not_stop_a_run_from_starting(run: RunDirectory) -> None:
    (run.path / ".lock").write_text(f"{os.getpid()}\n{os.uname().nodename}\n")
    assert writer(run.path) is None
    with sole_writer(run.path):
        assert writer(run.path) is not None
    assert writer(run.path) is None


def test_watching_prints_every_round_and_ends_with_the_process(
    run: RunDirectory, busy: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> None:
        busy.kill()
        busy.wait()

    looks = iter([lambda: None, lambda: run.append_round(vars(log(3, {"a": 0.1, "b": 0.2}))), killed])
    monkeypatch.setattr("flexperts.cli.status.time.sleep", lambda _seconds: next(looks)())
    result = CliRunner().invoke(app, ["status", str(run.path), "--watch"], catch_exceptions=False)
    lines = result.output.splitlines()
    assert [("running" in line, "2 of 3" in line, "3 of 3" in line) for line in lines] == [
        (True, True, False),
        (True, False, True),
        (False, False, True),
    ]


def refused(*arguments: str | Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    return str(refusal.value)


def test_the_ways_to_show_a_status_exclude_each_other(run: RunDirectory) -> None:
    assert refused("status", run.path, "--watch", "--json").startswith("--watch with --json: ")
    assert refused("status", run.path, "--json", "--ui").startswith("--json with --ui: ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--port", "8000"], "--port 8000: it says where the page is served"),
        (["--host", "::1"], "--host ::1: it says where the page is served"),
        (["--ui", "--port", "99999"], "--port 99999: ports are numbers from 0 to 65535"),
        (["--ui", "--port", "{taken}"], "choose another host or port"),
        (["--ui", "--host", "nowhere.invalid"], "--host nowhere.invalid --port 0: the server cannot listen"),
    ],
)
def test_a_page_that_cannot_be_served_is_refused(run: RunDirectory, options: list[str], told: str) -> None:
    recipe = run.path / "config.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [option.format(taken=taken.getsockname()[1]) for option in options]
        assert told in refused("status", run.path, *given)
        assert told in refused("run", recipe, "--out", run.path.parent / "new", *given)
    assert not (run.path.parent / "new").exists()


def test_a_page_without_its_extra_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "flexperts.serving.run_page.server", raising=False)
    assert "run pip install 'flexperts[serve]'" in refused("status", run.path, "--ui")


def test_a_deployed_runs_page_is_on_its_server(run: RunDirectory) -> None:
    said = refused("run", run.path / "config.toml", "--engine", "superlink://mine", "--out", "flu", "--ui")
    assert said.endswith("leave it out, and enter `flexperts status flu --ui` there")


def test_the_command_serves_the_page_until_it_is_interrupted(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def asked(_seconds: float) -> None:
        found.append(
            httpx.get(f"http://127.0.0.1:{port}/status.json", headers={"Authorization": "Bearer fx-known"})
        )
        raise KeyboardInterrupt

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("flexperts.serving.run_page.server.new_key", lambda: "fx-known")
    monkeypatch.setattr("flexperts.cli.status.time.sleep", asked)
    result = CliRunner().invoke(app, ["status", str(run.path), "--ui", "--port", str(port)], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"page of the run, until Ctrl-C: http://127.0.0.1:{port}/#key=fx-known" in result.output
    assert "other machines" not in result.output
    assert found[0].json()["status"]["run"] == "mine"


@pytest.mark.usefixtures("shared_base")
def test_a_run_in_this_process_has_a_page_until_its_end(
    tmp_path: Path, recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that asks all the time sees what is under way, round after round, and that the run has finished."""
    config = recipe("method.name=fedavg", "evaluation.rows=1", "evaluation.answers=last", "training.local_steps=1")
    (tmp_path / "recipe.toml").write_text(config.to_toml())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("flexperts.serving.run_page.server.new_key", lambda: "fx-known")
    found: list[Any] = []

    def ask() -> None:
        with httpx.Client(headers={"Authorization": "Bearer fx-known"}) as client:
            while not found or found[-1].get("status", {}).get("state") != "finished":
                with contextlib.suppress(httpx.ConnectError):
                    found.append(client.get(f"http://127.0.0.1:{port}/status.json").json())
                time.sleep(0.02)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    words = ["run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "mine"), "--ui", "--port", str(port)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    asking.join(10)
    assert not asking.is_alive(), "the page did not learn the end"
    later = f"(later: flexperts status {tmp_path / 'mine'} --ui)"
    assert f"page of the run, until it ends {later}: http://127.0.0.1:{port}/#key=fx-known" in result.output
    states = [answer["status"]["state"] for answer in found if "status" in answer]
    assert {"running", "finished"} <= {*states}
    assert [point["number"] for point in found[-1]["status"]["runs"][0]["points"]] == [1, 2]
    lines = [line["text"] for answer in found for line in answer["under_way"]]
    assert any("round 2 of 2, training" in line for line in lines)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/")
