"""The page on serving: its examples run as they stand, and its table of limits is the command's."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flexperts.serving.http.settings import Limits

from .scripted_engine import KEYS, ScriptedEngine, Served

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def block(kind: str, holding: str) -> str:
    (found,) = (text for text in re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S) if holding in text)
    assert ADDRESS in found
    return str(found)


def test_the_example_in_python(
    server: Served, shared: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEYS["clinic"])
    names: dict[str, object] = {}
    exec(block("python", "OpenAI").replace(ADDRESS, server.url), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert capsys.readouterr().out.splitlines() == [
        "zero_shot clinic@zero_shot: Summarise the note. 4",
        "global clinic@global: Summarise the note. 4",
        "personalized clinic: Summarise the note. 4",
        "clinic: Summarise the note.",
    ]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_examples_for_the_shell(server: Served, shared: ScriptedEngine) -> None:
    commands = block("bash", "curl").replace(ADDRESS, server.url)
    done = subprocess.run(["bash", "-ec", commands], env={"KEY": KEYS["clinic"]}, capture_output=True, text=True)
    assert done.returncode == 0
    assert '"id":"clinic"' in done.stdout
    assert done.stdout.endswith("data: [DONE]\n\n")
    assert shared.conversations == [[{"role": "user", "content": "Summarise the note."}]]


def test_the_defaults_on_the_page_are_those_of_the_command() -> None:
    limits = Limits()
    told = dict(re.findall(r"^\| `(--[\w-]+)` \| (\S+)", PAGE, re.MULTILINE))
    assert told["--max-queue"] == str(limits.queue)
    assert told["--per-client"] == str(limits.per_client)
    assert told["--max-tokens"] == str(limits.answer_tokens)
    assert told["--timeout"] == f"{limits.seconds:g}"
    assert limits.body_bytes == 1 << 20
