"""One run whose clients have files of every format: what is read, trained, evaluated and served of each.

The table in docs/data.md has a row per format and a column per test here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flexperts.config.run import RunConfig
from flexperts.data.prompts import messages_of
from flexperts.data.rows import Row
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer
from flexperts.recipe import parse_recipe

from .test_cli import call

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TURNS = ("Be brief.", "Hi {n}", "Hello {n}.", "How many?", "{n} of them.")


def chat(
    number: int, role: str = "role", text: str = "content", names: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    roles = names or ("system", "user", "assistant", "user", "assistant")
    return [{role: name, text: turn.format(n=number)} for name, turn in zip(roles, TURNS, strict=True)]


@dataclass(frozen=True)
class Format:
    """A format of the table: how row ``n`` is written, and what of it is trained with the tiny base's template."""

    record: Callable[[int], dict[str, Any]]
    trained: tuple[str, ...]
    earlier: int = 0


FORMATS = {
    "messages": Format(lambda n: {"messages": chat(n)}, ("Hello {n}.", "{n} of them.</s>"), 3),
    "sharegpt": Format(
        lambda n: {"conversations": chat(n, "from", "value", ("system", "human", "gpt", "human", "gpt"))},
        ("Hello {n}.", "{n} of them.</s>"),
        3,
    ),
    "prompt_completion": Format(
        lambda n: {"prompt": f"Count {n}", "completion": f"It is {n}."}, ("It is {n}.</s>",)
    ),
    "conversational": Format(
        lambda n: {"prompt": chat(n)[:4], "completion": chat(n)[4:]}, ("{n} of them.</s>",), 3
    ),
    "preference": Format(
        lambda n: {
            "prompt": chat(n)[:4],
            "chosen": chat(n)[4:],
            "rejected": [{"role": "assistant", "content": "No"}],
        },
        ("{n} of them.</s>",),
        3,
    ),
    "text": Format(lambda n: {"text": f"Row {n} is text."}, ("ow {n}", " is text.</s>")),
    "alpaca": Format(
        lambda n: {"instruction": "Count.", "input": f"It is {n}.", "output": f"Its {n}."}, ("Its {n}.</s>",)
    ),
    "dolly": Format(
        lambda n: {"instruction": "Count.", "context": f"It is {n}.", "response": f"Is {n}.", "category": "qa"},
        ("Is {n}.</s>",),
    ),
}
formats = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> tuple[Path, RunConfig, list[str]]:
    """A finished run, its recipe and its notices."""
    folder = tmp_path_factory.mktemp("formats")
    for name, its in FORMATS.items():
        (folder / "rows" / name).mkdir(parents=True)
        for side, numbers in (("train", range(4)), ("test", range(4, 6))):
            text = "".join(json.dumps(its.record(n)) + "\n" for n in numbers)
            (folder / "rows" / name / f"{side}.jsonl").write_text(text)
    config = parse_recipe(
        f"""
        {tiny_model}
        [data]
        folder = "{folder / "rows"}"
        [training]
        max_length = 256
        local_steps = 1
        [federation]
        rounds = 1
        [evaluation]
        max_new_tokens = 6
        """
    )
    said: list[str] = []
    observer = Observer()
    observer.notice = said.append  # type: ignore[method-assign]
    run_federation(config, folder / "run", observer)
    return folder / "run", config, said


@pytest.fixture(scope="module")
def trained(run: tuple[Path, RunConfig, list[str]]) -> Any:
    with_run = TrainedRun(run[0])
    yield with_run
    with_run.close()


def rows_of(trained: TrainedRun, name: str) -> list[Row]:
    return [*trained.client(name).rows.train]


@formats
def test_read(trained: TrainedRun, run: tuple[Path, RunConfig, list[str]], name: str) -> None:
    rows, its = rows_of(trained, name), FORMATS[name]
    assert len(rows) == 4
    for number, row in enumerate(rows):
        record = its.record(number)
        assert row.plain == (name == "text")
        if row.plain:
            assert row.instruction + row.response == record["text"]
        elif its.earlier:
            assert row.rejected == ("No" if name == "preference" else "")
            assert [(m["role"], m["content"]) for m in messages_of(row)] == [
                (m["role"], m["content"]) for m in chat(number)
            ]
        else:
            assert {row.instruction, row.context, row.response} - {""} <= {*record.values()}
            assert row.response == list(record.values())[-1 - ("category" in record)]
    told = {
        "messages": "chats in 'messages'",
        "sharegpt": "chats in 'conversations'",
        "text": "plain text in 'text'",
        "preference": "preferences of 'chosen' to 'rejected'",
    }
    if name in told:
        assert sum(f"rows are {told[name]}" in line and f"/{name}/train" in line for line in run[2]) == 1


@formats
def test_trained_mask(trained: TrainedRun, name: str) -> None:
    encoder = trained.workspace.encoder
    for number, example in enumerate(encoder.encode_all(rows_of(trained, name))):
        texts = [encoder.tokenizer.decode(example.input_ids[start:end]) for start, end in example.spans]
        assert texts == [text.format(n=number) for text in FORMATS[name].trained]


def test_both_answers_of_a_preference_are_trained_by_dpo(trained: TrainedRun) -> None:
    encoder = copy.copy(trained.workspace.encoder)
    encoder.pairs = True
    for number, example in enumerate(encoder.encode_all(rows_of(trained, "preference"))):
        texts = [[encoder.tokenizer.decode(f.input_ids[a:b]) for a, b in f.spans] for f in example.forms]
        assert texts == [[f"{number} of them.</s>"], ["No</s>"]]


@formats
def test_evaluated(trained: TrainedRun, run: tuple[Path, RunConfig, list[str]], name: str) -> None:
    """The NLL of all trained tokens, by one forward pass per row."""
    encoder = trained.workspace.encoder
    lines = (run[0] / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = trained.client(name).rows.test
    for line, row in zip(map(json.loads, lines), rows, strict=True):
        example = encoder.encode(row)
        ids = torch.tensor([example.input_ids])
        with trained.client(name).in_state(trained.request(name), "zero_shot") as (model, _), torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        expected = torch.cat([losses[start - 1 : end - 1] for start, end in example.spans])
        assert line["scores"]["zero_shot"]["nll"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert line["scores"]["zero_shot"]["tokens"] == len(expected)
        assert 0 <= line["scores"]["zero_shot"]["rouge_l"] <= 100
        assert line["response"] == row.response
        assert len(line.get("before", ())) == FORMATS[name].earlier


@formats
def test_served(trained: TrainedRun, run: tuple[Path, RunConfig, list[str]], name: str, tmp_path: Path) -> None:
    """Asked again after a run, a model gives the evaluation's answer: the prompt is the same, token by token."""
    row = trained.client(name).rows.test[0]
    lines = (run[0] / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    expected, encoder = json.loads(lines[0])["personalized"], trained.workspace.encoder
    asked = ["generate", run[0], row.instruction, "--client", name, "--context", row.context]
    if row.plain:
        assert encoder.tokens.plain(row.instruction) == list(encoder.encode(row).prompt)
        asked.append("--text")
    else:  # what `serve` and the chat page send
        assert encoder.conversation(messages_of(row)[:-1]) == list(encoder.encode(row).prompt)
    if row.before:
        (tmp_path / "before.json").write_text(json.dumps([message.mapping for message in row.before]))
        asked += ["--messages", tmp_path / "before.json"]
    code, printed, _ = call(*asked)
    assert (code, printed) == (0, f"{expected}\n")


def test_the_table_has_a_row_per_format() -> None:
    table = re.findall(r"^\| `data.format = \"(\w+)\"`", PAGE, re.M)
    assert {*table} == {*FORMATS} - {"conversational"} | {"instruction"}
