"""Limits, callers who hang up, failures, health, metrics, the end."""

from __future__ import annotations

import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from flexperts.errors import ServingError
from flexperts.serving.http import chat, delivery
from flexperts.serving.http.keys import OPERATOR
from flexperts.serving.http.settings import Limits

from .scripted_engine import (
    ASK,
    KEYS,
    ScriptedEngine,
    Served,
    bearer,
    counted,
    numbers,
    openai_of,
    served,
    told,
    until,
)

# How much is taken on.


def test_a_full_queue_is_told(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with served(engine, Limits(queue=2)) as server, openai_of(server, OPERATOR) as client:
        streams = [client.chat.completions.create(model="clinic", messages=ASK, stream=True) for _ in range(4 + 2)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="shop", messages=ASK)
        assert told(caught.value) == (429, "queue_full")
        assert int(caught.value.response.headers["retry-after"]) > 0
        engine.gate.set()
        assert all([*stream][-1].choices[0].finish_reason == "stop" for stream in streams)
        client.chat.completions.create(model="shop", messages=ASK)


def test_one_client_cannot_take_all_places(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with (
        served(engine, Limits(per_client=2)) as server,
        openai_of(server) as clinic,
        openai_of(server, "shop") as shop,
        openai_of(server, OPERATOR) as operator,
    ):
        streams = [clinic.chat.completions.create(model="clinic", messages=ASK, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            clinic.chat.completions.create(model="clinic@global", messages=ASK)
        assert told(caught.value) == (429, "rate_limit_exceeded")
        others = [c.chat.completions.create(model="shop", messages=ASK, stream=True) for c in (shop, operator)]
        engine.gate.set()
        assert [[*stream][-1].choices[0].finish_reason for stream in (*streams, *others)] == ["stop"] * 4
        until(lambda: clinic.chat.completions.create(model="clinic", messages=ASK).model == "clinic")


def test_the_client_tries_again_when_there_was_no_place(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with served(engine, Limits(per_client=1)) as server, openai_of(server) as client:
        stream = client.chat.completions.create(model="clinic", messages=ASK, stream=True)
        engine.gate.set()
        answer = client.with_options(max_retries=5).chat.completions.create(model="clinic", messages=ASK)
        assert answer.choices[0].finish_reason == "stop"
        stream.close()


def test_an_answer_that_takes_too_long_is_ended(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with served(engine, Limits(seconds=0.2)) as server, openai_of(server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.with_options(max_retries=3).chat.completions.create(model="clinic", messages=ASK)
        assert told(caught.value) == (504, "timeout")
        with pytest.raises(openai.APIError, match=r"an answer may take at most 0\.2 s"):
            [*client.chat.completions.create(model="clinic", messages=ASK, stream=True)]
        until(lambda: all(asked.ended.is_set() for asked in engine.asked))
        assert len(engine.asked) == 2, "the client asked again by itself"


def test_who_hangs_up_frees_the_place(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with served(engine) as server, openai_of(server) as client:
        stream = client.chat.completions.create(model="clinic", messages=ASK, stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: engine.asked[0].ended.is_set())
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(model="clinic", messages=ASK)
        until(lambda: engine.asked[1].ended.is_set())
        assert [asked.pieces[-1].finish for asked in engine.asked] == ["cancelled"] * 2
        until(lambda: counted(server, "499") == 2)


def test_a_stream_that_waits_shows_that_it_lives(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies close a connection on which nothing comes for a minute; readers skip what stands behind a colon."""
    monkeypatch.setattr(delivery, "_QUIET", 0.05)
    engine.gate.clear()
    with served(engine) as server, openai_of(server) as client:
        body = {"model": "clinic", "messages": ASK, "stream": True}
        url, headers = f"{server.url}/v1/chat/completions", bearer(KEYS["clinic"])
        with httpx.stream("POST", url, json=body, headers=headers) as answer:
            assert ": waiting" in itertools.islice(answer.iter_lines(), 6)
        stream = client.chat.completions.create(model="clinic", messages=ASK, stream=True)
        until(lambda: len(engine.asked) == 2)
        time.sleep(0.2)
        engine.gate.set()
        assert "".join(part.choices[0].delta.content or "" for part in stream) == "clinic: how are you"


def test_a_body_that_does_not_come_is_not_waited_for(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_PATIENCE", 0.1)
    with served(engine) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port), timeout=20) as caller:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['clinic']}\r\n"
            caller.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert caller.recv(1000).startswith(b"HTTP/1.1 408 ")


# What goes wrong behind it.


def test_a_failed_answer_is_an_error_and_not_half_an_answer(engine: ScriptedEngine) -> None:
    with served(engine) as server, openai_of(server) as client:
        engine.fault = ServingError("row 3", "secret of another row", "none")
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="clinic", messages=ASK)
        assert told(caught.value) == (503, "engine_failed")
        with pytest.raises(openai.APIError, match="the engine could not answer it") as seen:
            [*client.chat.completions.create(model="clinic", messages=ASK, stream=True)]
        assert "secret" not in str(caught.value) + str(seen.value)
        assert counted(server, "503") == 2


def test_an_answer_that_the_engine_gives_up_is_an_error_too(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with served(engine) as server, openai_of(server) as client:
        stream = client.chat.completions.create(model="clinic", messages=ASK, stream=True)
        engine.asked[0].cancel()  # as when it is closed
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def test_an_unforeseen_error_is_told_without_its_text(
    client: openai.OpenAI, shared: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "secret"

    def broken(*_: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(shared, "submit", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="clinic", messages=ASK)
    assert caught.value.status_code == 500
    assert "secret" not in str(caught.value) + caplog.text
    assert "RuntimeError" in caplog.text


def test_health_says_how_it_stands(engine: ScriptedEngine) -> None:
    with served(engine, ready=False) as server, openai_of(server) as client:

        def health() -> tuple[int, Any]:
            answer = httpx.get(f"{server.url}/health")
            return answer.status_code, answer.json()["status"]

        assert health() == (503, "loading")
        for call in (client.models.list, lambda: client.chat.completions.create(model="clinic", messages=ASK)):
            with pytest.raises(openai.InternalServerError) as caught:
                call()
            assert told(caught.value) == (503, "loading")
            assert int(caught.value.response.headers["retry-after"]) > 0
        server.service.ready(engine)
        assert health() == (200, "ready")
        assert client.models.list().data[0].id == "clinic"
        engine.failure = ServingError("the engine", "it broke", "start again")
        assert health() == (503, "failed")
        with pytest.raises(openai.InternalServerError):
            client.models.list()


@pytest.mark.parametrize(("path", "status"), [("/v1/nothing", 404), ("/v1/chat/completions", 405)])
def test_what_is_no_endpoint_is_told_in_the_same_shape(server: Served, path: str, status: int) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]


def test_the_metrics_count_what_happened(engine: ScriptedEngine) -> None:
    with served(engine) as server, openai_of(server) as client:
        client.chat.completions.create(model="clinic", messages=ASK)
        [*client.chat.completions.create(model="clinic", messages=ASK, stream=True)]
        client.chat.completions.create(model="clinic@global", messages=ASK)
        for wrong in ({"model": "shop"}, {"model": "nobody" * 50}, {"model": "clinic", "n": 2}):
            with pytest.raises(openai.APIStatusError):
                client.chat.completions.create(**{"messages": ASK, **wrong})  # type: ignore[call-overload]
        until(lambda: counted(server, "200") == 2)
        found = numbers(server)
        requests = {key[1:]: value for key, value in found.items() if key[0] == "flexperts_requests_total"}
        assert requests == {("clinic", "200"): 2, ("clinic@global", "200"): 1, ("", "404"): 2, ("", "400"): 1}
        assert found["flexperts_tokens_total", "clinic", "prompt"] == 22
        assert found["flexperts_tokens_total", "clinic", "generated"] == 8
        for name in ("first_token", "request"):
            assert found[f"flexperts_{name}_seconds_count", "clinic", ""] == 2
            assert found[f"flexperts_{name}_seconds_sum", "clinic", ""] > 0
        assert found["flexperts_queue", "", ""] == 0
        until(lambda: numbers(server)["flexperts_forward_passes_total", "", ""] == 15)


def test_the_metrics_show_who_waits(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with served(engine) as server, openai_of(server) as client:
        streams = [client.chat.completions.create(model="clinic", messages=ASK, stream=True) for _ in range(6)]
        found = numbers(server)
        assert (found["flexperts_running", "", ""], found["flexperts_queue", "", ""]) == (4, 2)
        for stream in streams:
            stream.close()


def test_the_metrics_are_the_operators(server: Served) -> None:
    answer = httpx.get(f"{server.url}/metrics", headers=bearer(KEYS["clinic"]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "operator_only")


# The end.


def test_requests_in_work_are_finished_when_the_server_stops(engine: ScriptedEngine) -> None:
    engine.pause = 0.05
    with served(engine) as server:
        client = openai_of(server)
        stream = client.chat.completions.create(model="clinic", messages=ASK, stream=True)
    assert engine.asked[0].pieces[-1].finish == "stop"
    assert [*stream][-1].choices[0].finish_reason == "stop"
    client.close()


def test_requests_are_not_waited_for_longer_than_the_grace(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Their callers are told, and nothing is logged as if it had failed."""
    engine.gate.clear()
    with ThreadPoolExecutor(1) as thread:
        with served(engine, grace=0.2) as server:
            client = openai_of(server)
            stream = client.chat.completions.create(model="clinic", messages=ASK, stream=True)
            whole = thread.submit(client.chat.completions.create, model="clinic", messages=ASK)
            until(lambda: len(engine.asked) == 2)
        assert [asked.pieces[-1].finish for asked in engine.asked] == ["cancelled"] * 2
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the server is stopping") as caught:
            whole.result()
        assert told(caught.value) == (503, "stopping")
        client.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
