"""Callers of `flexperts serve` who hold connections, send too much or too slowly, or send absurd values."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flexperts.errors import ConfigError
from flexperts.serving.contract import Message, ModelName, Sampling
from flexperts.serving.engine.decoding import check_sampling
from flexperts.serving.http import door
from flexperts.serving.http.settings import Address, Limits

from ..serving.scripted_engine import (  # noqa: TID252
    ASK,
    KEYS,
    ScriptedEngine,
    Served,
    bearer,
    openai_of,
    self_signed,
    served,
    told,
    until,
)

FEW = Limits(connections=128)
OPEN = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let connections without a key wait for a short time only."""
    monkeypatch.setattr(door, "PATIENCE", 0.5)


def connect(server: Served) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=20)


@contextmanager
def idle(server: Served, count: int) -> Iterator[list[socket.socket]]:
    """Hold connections on which nothing is asked."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(count)]


def is_closed(caller: socket.socket, seconds: float = 0.0) -> bool:
    """Return whether the server ends a connection within some seconds, whatever it says before."""
    caller.settimeout(seconds)
    try:
        while caller.recv(1 << 16):
            pass
    except (TimeoutError, BlockingIOError):
        return False
    except ConnectionError:
        pass
    return True


def drip(caller: socket.socket, first: bytes, part: bytes) -> float:
    """Send a part every tenth of a second; return after how many seconds the server ended the connection."""
    started = time.monotonic()
    try:
        caller.sendall(first)
        while not is_closed(caller) and time.monotonic() < started + 20:
            caller.sendall(part)
            time.sleep(0.1)
    except ConnectionError:
        pass
    return time.monotonic() - started


# Connections.


def test_idle_connections_keep_nobody_out(engine: ScriptedEngine) -> None:
    """Those that have waited longest are closed for others; an answer in progress is not."""
    engine.gate.clear()
    with served(engine, FEW) as server, openai_of(server) as client:
        stream = client.chat.completions.create(model="clinic", messages=ASK, stream=True)
        with idle(server, 1100) as callers:
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert client.with_options(max_retries=0).models.list().data[0].id == "clinic"
            until(lambda: sum(map(is_closed, callers)) >= 1100 - FEW.connections)
        engine.gate.set()
        assert "".join(part.choices[0].delta.content or "" for part in stream) == "clinic: how are you"


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.usefixtures("hasty")
def test_a_connection_that_asks_nothing_is_closed(engine: ScriptedEngine, tmp_path: Path, encrypted: bool) -> None:
    """Also before and during a TLS handshake."""
    address = Address(port=0, certificate=self_signed(tmp_path / "server.pem") if encrypted else None)
    with served(engine, address=address) as server, idle(server, 2) as (silent, half):
        half.sendall(b"\x16\x03\x01" if encrypted else b"GET /hea")
        assert is_closed(silent, 5)
        assert is_closed(half, 5)


@pytest.mark.usefixtures("hasty")
def test_headers_that_arrive_slowly_are_not_waited_for(engine: ScriptedEngine) -> None:
    with served(engine) as server, connect(server) as caller:
        assert drip(caller, OPEN.encode(), b"X-More: x\r\n") < 5


@pytest.mark.parametrize(
    "head", [OPEN, "GET /health HTTP/1.1\r\nHost: x\r\n", "GET /nothing HTTP/1.1\r\nHost: x\r\n"]
)
@pytest.mark.usefixtures("hasty")
def test_a_slow_body_without_a_key_is_not_waited_for(engine: ScriptedEngine, head: str) -> None:
    with served(engine) as server, connect(server) as caller:
        assert drip(caller, f"{head}Content-Length: 1000000\r\n\r\n".encode(), b"x") < 5


@pytest.mark.parametrize("part", [b"X-More: " + b"x" * 1000 + b"\r\n", b"x" * 1000])
def test_headers_are_bounded(engine: ScriptedEngine, part: bytes) -> None:
    with served(engine) as server, connect(server) as caller:
        caller.sendall(OPEN.encode() + b"X-First: ")
        sent = 0
        try:
            while sent < 64 << 20 and not is_closed(caller):
                sent += caller.send(part)
        except (ConnectionError, TimeoutError):
            pass
        assert sent < 16 << 20
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_slow_bodies_take_only_the_places_of_their_key(engine: ScriptedEngine) -> None:
    with served(engine, Limits(per_client=2)) as server, idle(server, 2) as callers, openai_of(server) as clinic:
        head = f"{OPEN}Authorization: Bearer {KEYS['clinic']}\r\nContent-Length: 1000\r\n\r\n{{"
        for caller in callers:
            caller.sendall(head.encode())
        until(lambda: server.service.load._active["clinic"] == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            clinic.chat.completions.create(model="clinic", messages=ASK)
        assert told(caught.value) == (429, "rate_limit_exceeded")
        with openai_of(server, "shop") as shop:
            assert shop.chat.completions.create(model="shop", messages=ASK).choices[0].finish_reason == "stop"
        for caller in callers:
            caller.close()
        until(lambda: not server.service.load._active["clinic"])


# Prompts.


@pytest.mark.parametrize("parts", [1, 100])
def test_a_long_prompt_is_refused_before_it_is_tokenized(engine: ScriptedEngine, parts: int) -> None:
    messages: Any = [{"role": "user", "content": "é" * (30_000 // parts)}] * parts
    rule = r"a prompt of 60000 bytes: .* at most 32000"
    with served(engine) as server, openai_of(server) as client, pytest.raises(openai.BadRequestError, match=rule):
        client.chat.completions.create(model="clinic", messages=messages)
    assert not engine.conversations


def test_a_smaller_limit_of_tokens_or_bytes_counts(engine: ScriptedEngine) -> None:
    for limits, most in ((Limits(prompt_tokens=5), 80), (Limits(prompt_bytes=8), 8)):
        with served(engine, limits) as server, openai_of(server) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="clinic", messages=[{"role": "user", "content": "x" * 81}])
            assert f"a prompt of 81 bytes: this server accepts at most {most};" in str(caught.value)


class SlowTokenizer(ScriptedEngine):
    """An engine that tokenizes one prompt at a time, when it may."""

    alone, may = threading.Lock(), threading.Event()

    def prompt_tokens(self, messages: Sequence[Message], model: ModelName | None = None) -> list[int]:
        with self.alone:
            self.may.wait()
            return super().prompt_tokens(messages, model)


def test_tokenizing_is_fair_between_keys_and_off_the_event_loop() -> None:
    """A silo's prompt waits for one of another silo's eight at most."""
    engine = SlowTokenizer()

    def ask(owner: str) -> str:
        with openai_of(server, owner) as client:
            question: Any = [{"role": "user", "content": owner}]
            return client.chat.completions.create(model=owner, messages=question).model

    with served(engine) as server, ThreadPoolExecutor(9) as callers:
        answers = [callers.submit(ask, "clinic") for _ in range(8)]
        until(lambda: server.service.load._active["clinic"] == 8)
        answers.append(callers.submit(ask, "shop"))
        until(lambda: server.service.load._active["shop"] == 1)
        assert httpx.get(f"{server.url}/health").status_code == 200
        engine.may.set()
        assert [answer.result() for answer in answers] == ["clinic"] * 8 + ["shop"]
    assert [one[-1]["content"] for one in engine.conversations][:3] == ["clinic", "shop", "clinic"]


# Values.


@pytest.fixture(scope="module")
def standing() -> Iterator[Served]:
    with served(ScriptedEngine()) as server:
        yield server


ABSURD = ["1e-300", "5e-324", "1e-45", "-1e-300", "NaN", "Infinity", "-Infinity", "true", "false", "1e999", '"1"',
          "1" + "0" * 400, "1" + "0" * 9000, "-1" + "0" * 30, "[1]", "{}"]  # fmt: skip


@pytest.mark.parametrize("name", ["temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "n",
                                  "frequency_penalty", "presence_penalty", "top_logprobs"])  # fmt: skip
def test_absurd_numbers_are_refused(standing: Served, name: str) -> None:
    with httpx.Client(base_url=standing.url, headers=bearer(KEYS["clinic"])) as client:
        for value in ABSURD:
            body = f'{{"model": "clinic", "messages": [{{"role": "user", "content": "x"}}], "{name}": {value}}}'
            answer = client.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400, value[:20]
            assert len(answer.json()["error"]["message"]) < 1000


@pytest.mark.parametrize(
    "sampling", [Sampling(1, temperature=1e-300), Sampling(1, top_p=1e-300), Sampling(1, top_p=float("nan"))]
)
def test_the_engine_refuses_them_too(sampling: Sampling) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        check_sampling(sampling)
