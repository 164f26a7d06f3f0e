"""`flexperts serve` on a real run: the command as users start it, the engine behind the official client."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flexperts.cli.main import main
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.serving.engine.engine import open_engine
from flexperts.serving.http.keys import OPERATOR

from .scripted_engine import KEYS, Served, bearer, served, until

PROGRAM = Path(sys.executable).with_name("flexperts")
Recipe = Callable[..., RunConfig]
SHORT = ("federation.rounds=1", "training.lr=0.05", "training.personal_lr=0.3", "evaluation.rows=1")
CLIENTS = ["clinic", "help_desk", "law_firm", "shop"]
STATES = ["zero_shot", "global", "personalized"]


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of FLEx for four silos; tests must not write into it."""
    out = tmp_path_factory.mktemp("serving") / "run"
    run_federation(recipe(*SHORT, "evaluation.max_new_tokens=6"), out)
    return out


# The engine behind HTTP.


@pytest.fixture(scope="module")
def real(finished: Path) -> Iterator[Served]:
    with served(open_engine(finished)) as server:
        yield server


def test_every_model_answers_as_generate_does_all_at_once(finished: Path, real: Served) -> None:
    trained = TrainedRun(finished)
    names = [(client, state) for client in CLIENTS for state in STATES]
    wanted = [trained.generate(client, f"Greet the {client}.", state=state) for client, state in names]
    trained.close()

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key=KEYS[OPERATOR], max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=f"{silo}@{state}",
                        messages=[{"role": "user", "content": f"Greet the {silo}."}],
                        max_tokens=6,
                    )
                    for silo, state in names
                )
            )

    answers = [answer.choices[0].message.content for answer in asyncio.run(ask())]
    assert answers == wanted
    assert len(set(wanted)) > 4, "all models say the same, so nothing could be mixed up"


def test_the_engine_takes_drawn_answers_and_conversations(real: Served) -> None:
    messages: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And now?"},
    ]
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key=KEYS["clinic"], max_retries=0) as client:
        settings: Any = {"temperature": 1.5, "top_p": 0.9, "seed": 3, "max_tokens": 12}
        drawn = [client.chat.completions.create(model="clinic", messages=messages, **settings) for _ in range(2)]
        assert drawn[0].choices[0].message.content == drawn[1].choices[0].message.content
        parts = client.chat.completions.create(model="clinic", messages=messages, stream=True, **settings)
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == drawn[0].choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="context"):
            client.chat.completions.create(model="clinic", messages=[{"role": "user", "content": "x" * 2000}])


# The command.


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["flexperts", "serve", *map(str, arguments)])
        patch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['serve', '--help']\n"
        "from flexperts.cli.main import app\n"
        "app(standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--make-keys" in done.stdout
    assert not {"torch", "pydantic", "starlette", "uvicorn", "prometheus_client"} & set(done.stderr.split())


def test_keys_are_printed_once(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    code, out, _ = call(finished, "--make-keys", path)
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [OPERATOR, *CLIENTS]
    assert call(finished, "--make-keys", path)[:2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines can reach this address, so callers need keys"),
        (["--host", "::"], "so callers need keys"),
        (["--keys", "nothing.toml"], "create it with --make-keys"),
        (["--tls-cert", "nothing.pem"], "the TLS files cannot be used"),
        (["--tls-key", "nothing.pem"], "a key needs its certificate"),
        (["--host", "127.0.0.1", "--port", "{taken}"], "the server cannot listen on this address"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(finished: Path, arguments: list[str], told: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = call(finished, *(a.format(taken=taken.getsockname()[1]) for a in arguments))
    assert code == 2
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_missing_library_is_named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for module in [name for name in sys.modules if name.startswith("flexperts.serving.")]:
        monkeypatch.delitem(sys.modules, module)
    code, _, err = call(finished)
    assert code == 2
    assert "pip install 'flexperts[serve]'" in err


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    code, _, err = call(tmp_path)
    assert code == 2
    assert err.startswith("error: ")


@dataclass
class Started:
    """The command in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    said: Callable[[], str]


@contextlib.contextmanager
def started(folder: Path, *arguments: str | Path) -> Iterator[Started]:
    log = folder / "log"
    with log.open("w") as out:
        command = [PROGRAM, "serve", *map(str, arguments), "--port", "0"]
        process = subprocess.Popen(
            command, stdout=out, stderr=out, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        until(lambda: "is the API" in log.read_text() or process.poll() is not None, 120)
        found = re.search(r"(http\S+)/v1 is the API", log.read_text())
        assert found, log.read_text()
        yield Started(process, found[1], log.read_text)
    finally:
        process.kill()
        process.wait()


def test_the_command_serves_until_it_is_told_to_stop(finished: Path, tmp_path: Path) -> None:
    with started(tmp_path, finished) as server:
        said = server.said()
        for client in CLIENTS:
            assert f"{client}@zero_shot, {client}@global, {client}" in said
        (key,) = re.findall(r"key until then: (\S+)", said)
        assert f"{server.url}/#key={key}" in said
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            assert [model.id for model in client.models.list()] == CLIENTS
            question: Any = [{"role": "user", "content": "secret question"}]
            stream = client.chat.completions.create(model="shop", messages=question, stream=True, max_tokens=400)
            server.process.send_signal(signal.SIGTERM)
            assert [*stream][-1].choices[0].finish_reason in ("stop", "length")
        assert server.process.wait(60) == 0
        assert "shop 200" in server.said()
        assert "secret question" not in server.said()
        assert "Traceback" not in server.said()


@pytest.mark.slow
def test_a_second_signal_does_not_wait(finished: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    key = dict(line.split("\t") for line in call(finished, "--make-keys", keys)[1].splitlines())["clinic"]
    with started(tmp_path, finished, "--keys", keys, "--grace", 600) as server:
        assert key not in server.said()
        slow = {
            "model": "clinic",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 500,
            "stream": True,
        }
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=slow, headers=bearer(key)) as answer:
            assert answer.status_code == 200
            server.process.send_signal(signal.SIGINT)
            until(lambda: not _listens(server.url))
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(60) == 0


def _listens(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False
