"""The relay on a SuperNode: thin, and honest about a worker that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from flexperts.communication.messages import info_of, records
from flexperts.communication.traffic import encoded_objects
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.deployment.state import make_private
from flexperts.deployment.worker import Worker
from flexperts.engines.grid import InProcessGrid
from flexperts.errors import ConfigError
from flexperts.recipe import load_silo

from .asking import RUN, converse, serving, through_relay

NO_WORKER = {"client": "clinic", "error": "no worker answers; start `flexperts silo serve`"}


def through(silo_file: Path, recipe: str = "") -> Callable[[str, RecordDict], RecordDict]:
    """Return a function that sends one message by Flower's ClientApp."""
    grid = InProcessGrid({1: through_relay(silo_file, recipe)})

    def ask(kind: str, content: RecordDict) -> RecordDict:
        if "info" in content:
            content.config_records["info"]["run"] = RUN
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, 1, "")])
        return reply.content

    return ask


def test_importing_the_relay_loads_no_model_library() -> None:
    code = "import sys, flexperts.deployment.relay; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "flwr" in loaded
    assert not {"torch", "transformers", "peft", "accelerate", "datasets", "pydantic"} & set(loaded)


def test_what_the_worker_says_comes_back_whole(silo_file: Path, handed: Callable[..., RunConfig]) -> None:
    silo, recipe = load_silo(silo_file), handed().to_toml()
    state = Path(silo.state)
    make_private(state)
    worker = Worker(silo)
    with serving(state, worker.reply):
        answers = converse(through(silo_file, recipe))
    other = "e" * 32
    direct = converse(
        lambda kind, content: deserialize(
            worker.reply(serialize({"kind": kind, "run": other, "recipe": recipe}, content))
        )[1]
    )
    assert {k: [*encoded_objects(c)] for k, c in answers.items()} == {
        k: [*encoded_objects(c)] for k, c in direct.items()
    }
    assert worker.loads == 1


def test_a_request_that_is_too_long_is_told_the_silos_rule(
    silo_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with silo_file.open("a") as file:
        file.write("max_message_bytes = 1048576\n")
    silo = load_silo(silo_file)
    worker = Worker(silo)
    with serving(Path(silo.state), worker.reply, silo.policy.max_message_bytes):
        reply = through(silo_file)("train", records({"agreement": "x" * (1 << 21)}))
    rule = "a request may have at most 1,048,576 bytes (policy.max_message_bytes)"
    assert info_of(reply)["error"] == f"PolicyError: {rule}; see that silo's log"
    assert f"a longer request: {rule}; change the recipe, or this silo's policy" in caplog.text


@pytest.mark.parametrize("kind", ["query.join", "query.initial", "train", "evaluate"])
def test_kind_run_and_recipe_reach_the_worker(silo_file: Path, tmp_path: Path, kind: str) -> None:
    seen: list[Any] = []

    def note(request: bytes) -> bytes:
        seen.append(deserialize(request))
        return serialize({}, records({"client": "clinic"}))

    with serving(tmp_path / "state", note):
        reply = through(silo_file, "seed = 3")(kind, records({"x": 1}))
    assert info_of(reply) == {"client": "clinic"}
    assert seen[0][0] == {"kind": kind, "run": RUN, "recipe": "seed = 3"}
    assert info_of(seen[0][1]) == {"x": 1, "run": RUN}


def test_a_failure_of_the_worker_is_told_by_its_class(silo_file: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "state", lambda _: serialize({"error": "DataError"})):
        reply = through(silo_file)("train", records({}))
    assert info_of(reply) == {"client": "clinic", "error": "DataError; see that silo's log"}
    with serving(tmp_path / "state", lambda _: b"noise"):
        reply = through(silo_file)("train", records({}))
    assert info_of(reply) == {"client": "clinic", "error": "FederationError; see that silo's log"}


def test_no_worker_is_told_in_an_ordinary_reply(silo_file: Path, tmp_path: Path) -> None:
    ask, state = through(silo_file), tmp_path / "state"
    assert info_of(ask("query.join", records({}))) == NO_WORKER  # no folder
    make_private(state)
    (state / "worker.sock").write_text("no socket")
    assert info_of(ask("train", records({}))) == NO_WORKER

    def die(_: bytes) -> bytes:
        raise OSError  # the loop drops the caller, as a killed worker would

    with serving(state, die):
        assert info_of(ask("train", records({}))) == NO_WORKER
    assert info_of(ask("train", records({}))) == NO_WORKER  # it has gone


def test_the_socket_of_another_user_is_told_nothing(
    silo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bytes] = []
    with serving(tmp_path / "state", lambda request: called.append(request) or serialize({})):
        ask = through(silo_file)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: os.stat(silo_file).st_uid + 1)  # noqa: PTH116
            assert info_of(ask("train", records({}))) == NO_WORKER
        assert called == []
        ask("train", records({}))
        assert len(called) == 1


def test_a_message_that_cannot_be_carried_is_answered(silo_file: Path) -> None:
    content = RecordDict({"a": ArrayRecord({"a": Array("float32", (1,), "torch.tensor", b"")})})
    assert info_of(through(silo_file)("train", content))["error"] == "FederationError; see that silo's log"


@pytest.mark.parametrize("text", ["", "[", 'name = "a"'])
def test_a_supernode_without_a_silo_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "silo.toml"
    if text:
        path.write_text(text)
    with pytest.raises(ConfigError, match="--node-config"):
        through(path)("train", records({}))
