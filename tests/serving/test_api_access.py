"""Whose key may call what, in every state and at every endpoint."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flexperts.serving.http.keys import OPERATOR
from flexperts.serving.http.settings import Address

from .scripted_engine import ASK, KEYS, ScriptedEngine, Served, bearer, openai_of, self_signed, served, told


@pytest.mark.parametrize("key", ["nobody", KEYS["clinic"] + "x", KEYS["clinic"][:-1], "x y", "ключ"])
@pytest.mark.parametrize("path", ["chat/completions", "models", "models/clinic", "../metrics"])
def test_a_key_that_is_nobodys_opens_nothing(server: Served, shared: ScriptedEngine, key: str, path: str) -> None:
    method = "POST" if path.startswith("chat") else "GET"
    headers = {"Authorization": f"Bearer {key}".encode()}
    answer = httpx.request(method, f"{server.url}/v1/{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert not shared.asked


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer"}, {"Authorization": "Basic eDp5"}, {"Authorization": KEYS["clinic"]}]
)
def test_a_key_comes_as_a_bearer_token(server: Served, header: dict[str, str]) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers=header).status_code == 401


def test_the_client_names_a_wrong_key_as_such(server: Served) -> None:
    with openai_of(server, "nobody") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


# Who may call what.


@pytest.mark.parametrize("name", ["shop", "shop@zero_shot", "shop@global", "shop@personalized"])
def test_another_silos_model_is_as_if_it_did_not_exist(
    client: openai.OpenAI, shared: ScriptedEngine, name: str
) -> None:
    nobody = name.replace("shop", "shup")
    messages = []
    for asked in (name, nobody):
        for call in (
            lambda asked=asked: client.chat.completions.create(model=asked, messages=ASK),
            lambda asked=asked: client.chat.completions.create(model=asked, messages=ASK, stream=True),
            lambda asked=asked: client.models.retrieve(asked),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                call()
            assert told(caught.value) == (404, "model_not_found")
            messages.append(str(caught.value.body["message"]).replace(asked, "?"))  # type: ignore[index]
    assert len(set(messages)) == 1, "a caller can distinguish the two"
    assert not shared.asked


def test_the_models_are_those_of_the_key(server: Served) -> None:
    for owner, names in (("clinic", ["clinic"]), ("shop", ["shop"]), (OPERATOR, ["clinic", "shop"])):
        with openai_of(server, owner) as client:
            listed = client.models.list()
            assert [model.id for model in listed] == names
            assert [model.owned_by for model in listed] == names
            assert client.models.retrieve(names[0]).id == names[0]
            assert client.models.retrieve(f"{names[-1]}@global").owned_by == names[-1]


def test_every_state_that_is_listed_answers(server: Served) -> None:
    with openai_of(server, OPERATOR) as client:
        (listed, _) = client.models.list().data
        states: Any = (listed.model_extra or {})["states"]
        assert list(states) == ["zero_shot", "global", "personalized"]
        answers = [client.chat.completions.create(model=name, messages=ASK) for name in states.values()]
    assert [a.model for a in answers] == ["clinic@zero_shot", "clinic@global", "clinic"]


def test_neither_keys_nor_prompts_are_logged(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "flexperts"), caplog.at_level("DEBUG", "uvicorn"):
        client.chat.completions.create(model="clinic", messages=ASK)
    records = [r.getMessage() for r in caplog.records if r.name.split(".")[0] in ("flexperts", "uvicorn")]
    assert any("clinic 200" in record for record in records)
    assert not [record for record in records if "how are you" in record or KEYS["clinic"] in record]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return self_signed(tmp_path / "server.pem")


def test_tls(engine: ScriptedEngine, certificate: Path) -> None:
    with served(engine, address=Address(port=0, certificate=certificate)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=certificate)
        answer = httpx.get(f"{server.url}/v1/models", headers=bearer(KEYS["clinic"]), verify=trusting)
        assert answer.status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http") + "/health")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")),
    ],
)
def test_which_addresses_need_keys(host: str, loopback: bool) -> None:
    assert Address(host).is_loopback == loopback
