"""The request log: every question and what came of it, no text of anyone, and no reply without its line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.communication.messages import records
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.deployment import request_log
from flexperts.deployment.request_log import Entry, RequestLog
from flexperts.deployment.worker import Worker
from flexperts.errors import ArtifactError

from .asking import RUN, converse

SECRET, OTHER = "xylophone", "f" * 32


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_request_is_a_line_with_what_came_of_it(silo: SiloConfig, handed: Callable[..., RunConfig]) -> None:
    limited = silo.policy.model_copy(update={"max_rounds": 2})
    worker = Worker(silo.model_copy(update={"policy": limited}))
    recipe, longer = handed().to_toml(), handed("federation.rounds=3").to_toml()
    for _ in range(2):
        converse(lambda kind, content: deserialize(worker.reply(asked(kind, RUN, recipe, content)))[1])
    requests = [asked("query.join", OTHER, longer), asked(SECRET, SECRET, SECRET), SECRET.encode(), None]
    sent = [len(worker.reply(request)) for request in requests]
    path = Path(silo.state) / "requests.jsonl"
    found = lines(path)
    joined, trained = ("query.join", None, "answered", None), ("train", 1, "answered", None)
    told = [(one["kind"], one["round"], one["outcome"], one["rule"]) for one in found]
    assert (told[0], told[2], told[4]) == (joined, trained, joined)
    assert told[6:8] == [("train", 1, "repeated", None), ("evaluate", 1, "repeated", None)]
    assert told[8:] == [
        ("query.join", None, "refused", "a run may have at most 2 rounds (policy.max_rounds)"),
        (None, None, "failed", "FederationError"),
        (None, None, "failed", "FederationError"),
        (None, None, "refused", "a request may have at most 1,073,741,824 bytes (policy.max_message_bytes)"),
    ]
    assert [one["method"] for one in found] == ["flex"] * 9 + [None] * 3
    assert [one["run"] for one in found] == [RUN] * 8 + [OTHER] + [None] * 3
    assert [one["sent"] for one in found[8:]] == sent
    assert [one["received"] for one in found[8:]] == [None if r is None else len(r) for r in requests]
    assert all(one["seconds"] >= 0 and one["time"].endswith("+00:00") for one in found)
    assert path.stat().st_mode & 0o777 == 0o600
    texts = [text for row in lines(Path(silo.data.train)) for text in row.values()]
    assert not [text for text in [SECRET, *map(str, texts)] if text in path.read_text()]


def asked(kind: str, run: str, recipe: str, content: Any = None) -> bytes:
    return serialize({"kind": kind, "run": run, "recipe": recipe}, content or records({}))


def test_a_reply_that_is_not_on_record_does_not_leave(
    silo: SiloConfig, handed: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, request = Worker(silo), asked("query.join", RUN, handed().to_toml())
    assert deserialize(worker.reply(request))[0] == {}
    before, write = worker.requests.path.read_bytes(), os.write

    def half(descriptor: int, text: bytes) -> int:
        is_ours = Path(f"/proc/self/fd/{descriptor}").resolve() == worker.requests.path
        return write(descriptor, text[: len(text) // 2] if is_ours else text)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        assert deserialize(worker.reply(request))[0] == {"error": "ArtifactError"}
    assert worker.requests.path.read_bytes() == before
    assert deserialize(worker.reply(request))[0] == {}
    assert [one["outcome"] for one in lines(worker.requests.path)] == ["answered", "answered"]


def test_the_newest_lines_are_kept_in_a_bounded_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry(user=7, kind="train", round=1)
    log = RequestLog(tmp_path / "state")
    log.write(entry)
    monkeypatch.setattr(request_log, "_LARGEST", 3 * log.path.stat().st_size)
    for number in range(2, 51):
        entry.round = number
        log.write(entry)
    files = sorted((tmp_path / "state").iterdir(), key=lambda path: int("0" + path.suffix[1:].replace("jsonl", "")))
    assert [path.name for path in files] == ["requests.jsonl", *(f"requests.jsonl.{n}" for n in range(1, 10))]
    kept = [one["round"] for path in reversed(files) for one in lines(path)]
    assert kept == [*range(51 - len(kept), 51)]
    assert 28 <= len(kept) <= 30
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "requests.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="cannot be written"):
        RequestLog(tmp_path / "state")
    assert not (tmp_path / "elsewhere").exists()
