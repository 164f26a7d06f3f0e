"""Chat completions over a real socket, asked for by the official client: what is answered, what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from flexperts.serving.http.keys import OPERATOR
from flexperts.serving.http.settings import Limits

from .scripted_engine import (
    ASK,
    KEYS,
    ScriptedEngine,
    Served,
    bearer,
    openai_of,
    served,
    told,
)

# What is answered.


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="clinic", messages=ASK)
    assert answer.choices[0].message.content == "clinic: how are you"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "clinic"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 4, 15)


def test_a_stream_is_the_whole_answer_in_parts(client: openai.OpenAI) -> None:
    options: Any = {"stream_options": {"include_usage": True}}
    chunks = [*client.chat.completions.create(model="clinic@global", messages=ASK, stream=True, **options)]
    *parts, counts = chunks
    assert [p.choices[0].delta.content for p in parts] == ["", "clinic@global:", " how", " are", " you", None]
    assert [p.choices[0].finish_reason for p in parts] == [None] * 5 + ["stop"]
    assert parts[0].choices[0].delta.role == "assistant"
    assert len({(p.id, p.model, p.created) for p in chunks}) == 1
    assert counts.choices == []
    assert counts.usage is not None
    assert (counts.usage.prompt_tokens, counts.usage.completion_tokens) == (11, 4)


def test_a_stream_tells_no_counts_unasked(client: openai.OpenAI) -> None:
    assert all(chunk.choices for chunk in client.chat.completions.create(model="clinic", messages=ASK, stream=True))


def test_the_bytes_of_a_stream(server: Served) -> None:
    """Readers of events other than openai's: one event a line, no buffering by nginx, an end that is named."""
    body = {"model": "clinic", "messages": ASK, "stream": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=bearer(KEYS["clinic"]))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-store")
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


def test_the_async_client_and_many_at_once(server: Served, shared: ScriptedEngine) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEYS[OPERATOR], max_retries=0) as client:
            questions: list[Any] = [[{"role": "user", "content": f"question {i}"}] for i in range(30)]
            models = ["clinic", "shop@global", "clinic@zero_shot"] * 10
            asked = zip(models, questions, strict=True)
            return await asyncio.gather(*(client.chat.completions.create(model=m, messages=q) for m, q in asked))

    answers = asyncio.run(ask())
    assert [a.choices[0].message.content for a in answers] == [
        f"{model}: question {i}" for i, model in enumerate(["clinic", "shop@global", "clinic@zero_shot"] * 10)
    ]


def test_how_to_draw_reaches_the_engine(client: openai.OpenAI, shared: ScriptedEngine) -> None:
    client.chat.completions.create(
        model="clinic", messages=ASK, max_tokens=2, temperature=0.5, top_p=0.9, seed=7, stop=["you"]
    )
    drawn = shared.asked[-1].sampling
    assert (drawn.max_new_tokens, drawn.temperature, drawn.top_p, drawn.seed) == (2, 0.5, 0.9, 7)
    assert drawn.stop == ("you",)
    answer = client.chat.completions.create(model="clinic", messages=ASK, max_completion_tokens=2, stop="x")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("clinic: how", "length")
    assert shared.asked[-1].sampling.stop == ("x",)


def test_answers_are_greedy_and_bounded_by_default(client: openai.OpenAI, shared: ScriptedEngine) -> None:
    client.chat.completions.create(model="clinic", messages=ASK)
    drawn = shared.asked[-1].sampling
    assert (drawn.max_new_tokens, drawn.temperature, drawn.top_p, drawn.seed, drawn.stop) == (512, 0, 1, None, ())


def test_a_conversation_reaches_the_engine(client: openai.OpenAI, shared: ScriptedEngine) -> None:
    messages: Any = [
        {"role": "developer", "content": "be short"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "2"}],
            "name": "A",
        },
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go on"},
    ]
    client.chat.completions.create(model="clinic", messages=messages)
    assert shared.conversations == [
        [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": "one 2"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "go on"},
        ]
    ]


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "someone", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "modalities": ["text"]},
        {"temperature": None, "stop": None, "top_logprobs": None, "unknown_but_null": None},
    ],
)
def test_what_changes_nothing_is_taken(client: openai.OpenAI, harmless: dict[str, Any]) -> None:
    answer = client.chat.completions.create(model="clinic", messages=ASK, extra_body=harmless)
    assert answer.choices[0].message.content == "clinic: how are you"


# What is refused.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a"}),
        ("web_search_options", {}),
        ("moderation", {"model": "m"}),
        ("temperature", 2.5),
        ("temperature", -0.1),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 513),
        ("seed", 1 << 64),
        ("stop", 5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": "yes"}),
        ("temprature", 0.5),
        ("top_k", 5),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
        ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}, *ASK]),
        ("model", 5),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    client: openai.OpenAI, shared: ScriptedEngine, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="clinic", messages=ASK, extra_body={field: value})
    body: Any = caught.value.body
    assert field in body["message"]
    assert str(body["param"]).split(".")[0] == field
    assert body["type"] == "invalid_request_error"
    assert "; " in body["message"], "no remedy"
    assert not shared.asked


def test_a_misspelt_field_is_asked_about(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        client.chat.completions.create(model="clinic", messages=ASK, extra_body={"temprature": 0.5})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "clinic"}'])
def test_a_body_that_is_none_is_refused(server: Served, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=bearer(KEYS["clinic"]))
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_is_not_repeated_to_its_sender_or_to_the_log(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"model": "clinic", "messages": [{"role": "user", "content": ["secret"]}]}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=bearer(KEYS["clinic"]))
    assert answer.status_code == 400
    assert "secret" not in answer.text + caplog.text


def test_a_body_that_is_too_long_is_refused(engine: ScriptedEngine) -> None:
    with served(engine, Limits(body_bytes=2000)) as server, openai_of(server) as client:
        long: Any = [{"role": "user", "content": "x" * 3_000_000}]
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="clinic", messages=long)
        assert told(caught.value) == (413, "request_too_large")
        client.chat.completions.create(model="clinic", messages=ASK)


def test_a_prompt_that_is_too_long_is_refused(
    shared: ScriptedEngine, server: Served, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="a prompt of 2001 tokens: the context holds 2000; shorten it"):
        client.chat.completions.create(model="clinic", messages=[{"role": "user", "content": "x" * 2001}])
    with (
        served(shared, Limits(prompt_tokens=10)) as tight,
        openai_of(tight) as other,
        pytest.raises(openai.BadRequestError, match="a prompt of 11 tokens"),
    ):
        other.chat.completions.create(model="clinic", messages=ASK)
    assert not shared.asked
