"""Preference rows: as texts and as chats, what is refused, their tokens, and hashes of rows without them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flexperts.data.clients import rows_hash
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import ClientRows, Row
from flexperts.data.sources import read_source
from flexperts.errors import DataError
from flexperts.testing import byte_tokenizer

PAIR = Row("Q", "good", passage="Q", rejected="bad")


def says(*turns: str) -> list[dict[str, str]]:
    """Messages from ``role: content``."""
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


ASKED, GOOD, BAD = says("user: Q"), says("assistant: good"), says("assistant: bad")
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "lists of messages": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "two chats": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "two chats and their prompt": {"prompt": "Q", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "a text and messages": {"prompt": "Q", "chosen": GOOD, "rejected": BAD},
    "our names": {"instruction": "Q", "chosen": "good", "rejected": "bad"},
}


def read(folder: Path, record: dict[str, Any], columns: dict[str, str] | None = None) -> Row:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (row,) = read_source(str(path), columns or {})
    return row


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_row(tmp_path: Path, form: str) -> None:
    assert read(tmp_path, FORMS[form]) == PAIR
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FORMS[form]]), path)
    assert read_source(str(path), {}) == [PAIR]


def test_a_recipe_can_name_the_columns(tmp_path: Path) -> None:
    record = {"q": "Q", "best": "good", "worse": "bad"}
    columns = {"instruction": "q", "response": "best", "rejected": "worse"}
    assert read(tmp_path, record, columns) == PAIR


def test_a_column_rejected_beside_a_response_is_not_an_answer(tmp_path: Path) -> None:
    """Where runs had such a column, their rows have not changed."""
    assert read(tmp_path, {"instruction": "Q", "response": "good", "rejected": "no"}).rejected == ""
    assert read(tmp_path, FORMS["texts"], {"rejected": ""}).rejected == ""


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (FORMS["texts"] | {"rejected": " "}, "rejected is empty"),
        (FORMS["texts"] | {"rejected": "good"}, "rejected is the same as chosen"),
        ({"chosen": "good", "rejected": "bad"}, "no prompt: the instruction is required"),
        ({"chosen": ASKED + GOOD, "rejected": says("user: other") + BAD}, "the two chats differ before"),
        ({"chosen": ASKED, "rejected": ASKED + BAD}, "the two chats differ before"),
        ({"chosen": GOOD, "rejected": BAD}, "no turn of the user before"),
        ({"chosen": ASKED + GOOD, "rejected": [1]}, "rejected is neither text nor a list of messages"),
        ({"prompt": ASKED, "chosen": [{"role": "assistant"}], "rejected": BAD}, "chosen is empty"),
    ],
)
def test_what_is_no_pair_is_refused_without_its_text(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, record)
    assert said in str(caught.value)
    for private in ("good", "bad", "other"):
        assert private not in str(caught.value).replace("rejected", "")


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_both_answers_follow_the_same_prompt(template: Any) -> None:
    encoder = PromptEncoder(byte_tokenizer(), template, pairs=True)
    row = Row("Q", "good", context="C" * 90, rejected="very bad" * 5)
    chosen, rejected = encoder.encode(row).forms
    alone = PromptEncoder(byte_tokenizer(), template)
    assert chosen.input_ids == alone.encode(row).input_ids
    assert rejected.input_ids == alone.encode(Row("Q", row.rejected, context=row.context)).input_ids
    assert alone.encode(row).rejected is None


def test_a_context_is_cut_for_the_longer_answer() -> None:
    encoder = PromptEncoder(byte_tokenizer(), "alpaca", 400, pairs=True)
    chosen, rejected = encoder.encode(Row("Q", "good", context="C" * 300, rejected="bad " * 20)).forms
    assert chosen.cut
    assert chosen.prompt == rejected.prompt
    assert len(rejected.input_ids) == 400 > len(chosen.input_ids)
    with pytest.raises(DataError, match="must hold instruction and response"):
        encoder.encode(Row("Q", "good", rejected="b" * 400))


def test_only_what_is_set_counts_in_a_hash() -> None:
    """A row without a rejected answer has the hash that it had before there were any."""
    row = Row("Q", "A", "C", "k", "p", "file, line 1")
    old = hashlib.sha256(json.dumps([[("Q", "A", "C", "k", "p")], []]).encode()).hexdigest()
    assert rows_hash(ClientRows((row,), ())) == old
    assert rows_hash(ClientRows((PAIR,), ())) != rows_hash(ClientRows((Row("Q", "good", passage="Q"),), ()))
