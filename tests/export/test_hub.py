"""`flexperts export --push` and `generate hub:NAME`, by huggingface_hub's client against a hub on this machine."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import openai
import pytest
import yaml
from huggingface_hub.utils import close_session
from tests.serving.test_serve_command import started

from flexperts import PersonalModel
from flexperts.cli import serve
from flexperts.cli.main import main
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.serving.contract import Piece, Sampling

from .fake_hub import TOKEN, FakeHub, Repository, running
from .test_export import SHORT

Ask = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        close_session()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Return a function that runs a command, and returns what it prints; the exit code is checked."""

    def run(*words: Any, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flexperts", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        return said.out + said.err

    return run


@pytest.fixture(scope="module")
def run(recipe: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_federation(recipe(*SHORT, "method.name=flex"), out)
    return out


@pytest.mark.usefixtures("exports_checked_here")
def test_a_pushed_model_is_private_complete_and_answers_from_there(
    run: Path, hub: FakeHub, ask: Ask, tiny_base: Path
) -> None:
    words = ("export", run, "--client", "clinic", "--form", "personal")
    said = ask(*words, "--push", "ward/clinic", "--yes")
    assert "sending clinic's model to ward/clinic (private)" in said
    assert f"{hub.url}/ward/clinic" in said
    kept = hub.repositories["ward/clinic"]
    assert kept.private
    assert set(kept.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "graft.safetensors",
        "personal.json",
    }
    everything = b"".join(kept.files.values())
    assert str(run.parent).encode() not in everything
    assert b"shop" not in everything
    card = yaml.safe_load(kept.files["README.md"].decode().split("---")[1])
    assert card["library_name"] == "peft"
    assert "federated-learning" in card["tags"]
    asked = ("Say hi.", "--max-tokens", "6")
    there = ask("generate", "hub:ward/clinic", *asked, "--base", tiny_base)
    here = ask("generate", run, *asked, "--client", "clinic")
    assert there == here


@pytest.mark.usefixtures("exports_checked_here")
def test_a_folder_is_kept_and_sent_and_the_library_reads_it(
    run: Path, hub: FakeHub, ask: Ask, tmp_path: Path
) -> None:
    ask("export", run, "--form", "merged", "--to", tmp_path / "all", "--push", "ward/all", "--public", "--yes")
    kept = hub.repositories["ward/all"]
    assert not kept.private
    assert kept.files == {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    with (
        PersonalModel.from_pretrained("ward/all") as there,
        PersonalModel.from_pretrained(tmp_path / "all") as here,
    ):
        assert there.generate(["Say hi."], max_new_tokens=6) == here.generate(["Say hi."], max_new_tokens=6)


@pytest.mark.usefixtures("exports_checked_here")
def test_nothing_leaves_without_an_answer(
    run: Path, hub: FakeHub, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", run, "--client", "clinic", "--form", "personal", "--push", "ward/clinic")
    assert "nobody can be asked here" in ask(*words, code=2)
    monkeypatch.setattr("flexperts.cli.export.sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "n")
    assert "no row is sent" in ask(*words, code=1)
    assert not hub.asked


@pytest.mark.usefixtures("exports_checked_here")
def test_a_public_repository_gets_nothing_unless_it_is_asked_for(run: Path, hub: FakeHub, ask: Ask) -> None:
    hub.repositories["ward/clinic"] = Repository(private=False)
    words = ("export", run, "--client", "clinic", "--form", "personal", "--push", "ward/clinic", "--yes")
    assert "it exists and is public, and a private one was asked for" in ask(*words, code=2)
    assert not hub.repositories["ward/clinic"].files
    assert not any("preupload" in request or "/lfs/" in request for request in hub.asked)


@pytest.mark.usefixtures("exports_checked_here")
@pytest.mark.parametrize(
    ("form", "state", "options"),
    [
        ("merged", "global", []),
        ("transformers", "personalized", ["--trust-remote-code"]),
    ],
)
def test_generate_reads_a_folder(
    form: str, state: str, options: list[str], run: Path, ask: Ask, tmp_path: Path
) -> None:
    words = ("--client", "clinic", "--form", form, "--state", state)
    ask("export", run, *words, "--to", tmp_path / "out")
    there = ask("generate", tmp_path / "out", "Say hi.", "--max-tokens", "6", *options)
    assert there == ask("generate", run, "Say hi.", "--client", "clinic", "--state", state, "--max-tokens", "6")


@pytest.mark.usefixtures("exports_checked_here")
def test_the_server_answers_from_the_hub_as_the_run_does(
    run: Path, hub: FakeHub, ask: Ask, tiny_base: Path
) -> None:
    """Rows of different lengths together; the questions of `generate` one by one."""
    words = ("export", run, "--client", "clinic", "--form", "personal")
    ask(*words, "--push", "ward/clinic", "--yes")
    questions = ["Say hi.", "Name three items, and say which one is the largest.", "Why?"]
    wanted = [ask("generate", run, q, "--client", "clinic", "--max-tokens", "6").rstrip("\n") for q in questions]
    clients, recipe, load = serve._of_exported("hub:ward/clinic", str(tiny_base), False)
    assert (clients, recipe) == ({"clinic"}, None)
    with closing(load(max_rows=4, max_tokens=4096, max_clients=None)) as engine:
        [model] = engine.models
        assert str(model) == "clinic"
        ended, answers = threading.Semaphore(0), [""] * len(questions)

        def hear(number: int, piece: Piece) -> None:
            answers[number] += piece.text
            if piece.finish:
                ended.release()

        for number, question in enumerate(questions):
            prompt = engine.prompt_tokens([{"role": "user", "content": question}], model)
            engine.submit(model, prompt, Sampling(6), partial(hear, number))
        for _ in questions:
            assert ended.acquire(timeout=60)
        assert engine.counters.failed == 0
    assert [cut(answer) for answer in answers] == [cut(answer) for answer in wanted]
    assert len(set(answers)) > 1


def cut(answer: str) -> str:
    """The answer alone, without the line on stderr that it was cut."""
    return answer.partition("[cut at")[0].strip()


@pytest.mark.usefixtures("exports_checked_here")
def test_the_command_serves_a_folder(run: Path, ask: Ask, tmp_path: Path) -> None:
    ask("export", run, "--form", "merged", "--to", tmp_path / "all")
    question: Any = [{"role": "user", "content": "Say hi."}]
    with started(tmp_path, tmp_path / "all") as server:
        (key,) = re.findall(r"key until then: (\S+)", server.said())
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            assert [model.id for model in client.models.list()] == ["all"]
            answer = client.chat.completions.create(model="all", messages=question, max_tokens=6)
    there = ask("generate", tmp_path / "all", "Say hi.", "--max-tokens", "6")
    assert (answer.choices[0].message.content or "").strip() == cut(there)


def test_a_newcomer_cannot_join_from_a_model(ask: Ask, tmp_path: Path) -> None:
    for place in ("hub:ward/clinic", tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        said = ask("join", place, "--data", "rows.jsonl", code=2)
        assert f"error: {place}: an exported model has no recipe" in said
        assert "ask the run's operator for config.toml" in said


def test_mistakes_are_refused_before_anything_is_loaded(run: Path, hub: FakeHub, ask: Ask, tmp_path: Path) -> None:
    assert "neither --to nor --push" in ask("export", run, "--form", "merged", code=2)
    assert "no repository can have this name" in ask("export", run, "--push", "a/b/c", "--yes", code=2)
    assert "the hub does not give it" in ask("generate", "hub:ward/none", "Say hi.", code=2)
    assert "an exported folder holds one model" in ask("generate", "hub:ward/x", "Hi.", "--client", "a", code=2)
    assert "a run has a model for each client" in ask("generate", run, "Say hi.", code=2)
    assert str(tmp_path / "none") in ask("generate", tmp_path / "none", "Say hi.", "--client", "a", code=2)
    assert {request.split("/")[1] for request in hub.asked} <= {"api"}


@pytest.mark.usefixtures("exports_checked_here")
def test_a_wrong_token_is_said(run: Path, hub: FakeHub, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    words = ("export", run, "--form", "merged", "--push", "ward/all", "--yes")
    assert "the model cannot be uploaded" in ask(*words, code=2)
    assert not hub.repositories
