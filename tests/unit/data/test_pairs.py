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
    "two chats and their first turns": {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "our names": {"instruction": "Q", "chosen": "good", "rejected": "bad"},
}
BEFORE = says("system: Be brief.", "user: Hi", "assistant: Hello", "user: Q")
CHATS: dict[str, dict[str, Any]] = {
    "lists of messages": {"prompt": BEFORE, "chosen": GOOD, "rejected": BAD},
    "two chats": {"chosen": BEFORE + GOOD, "rejected": BEFORE + BAD},
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
        ({"chosen": ASKED + GOOD, "rejected": says("user: other") + BAD}, "differ before their last turn"),
        ({"chosen": ASKED, "rejected": ASKED + BAD}, "differ before their last turn"),
        ({"prompt": BEFORE, "chosen": GOOD, "rejected": says("user: other")}, "differ before their last turn"),
        ({"chosen": GOOD, "rejected": BAD}, "the chat has no answer to a user"),
        ({"chosen": ASKED + GOOD, "rejected": ASKED + GOOD}, "rejected is the same as chosen"),
        ({"chosen": ASKED + GOOD, "rejected": [1]}, "rejected is a list: a chat is a list of objects"),
        ({"prompt": ASKED, "chosen": [{"role": "assistant"}], "rejected": BAD}, "chosen, turn 1 is empty"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": []}, "rejected is empty"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "context": "other"}, "context beside a chat"),
    ],
)
def test_what_is_no_pair_is_refused_without_its_text(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, record)
    assert said in str(caught.value)
    for private in ("good", "bad", "other"):
        assert private not in str(caught.value).replace("rejected", "")


@pytest.mark.parametrize("form", CHATS)
def test_a_pair_may_have_turns_before_its_question(tmp_path: Path, form: str) -> None:
    """Both answers follow all of them, and only the last answers are trained."""
    row = read(tmp_path, CHATS[form])
    assert (row.instruction, row.response, row.rejected, row.passage) == ("Q", "good", "bad", "Hi")
    assert [message.content for message in row.before] == ["Be brief.", "Hi", "Hello"]
    encoder = PromptEncoder(byte_tokenizer(), "chat", pairs=True)
    example = encoder.encode(row)
    for encoded in (*example.forms, PromptEncoder(byte_tokenizer(), "chat").encode(row)):
        assert encoded.prompt == tuple(encoder.conversation(BEFORE))
        assert encoded.spans == ((encoded.prompt_length, len(encoded.input_ids)),)
    texts = [encoder.tokenizer.decode(form.input_ids[form.prompt_length :]) for form in example.forms]
    assert texts == ["good</s>", "bad</s>"]


def test_an_answer_keeps_its_thinking(tmp_path: Path) -> None:
    """Two answers may differ in their thinking alone, as a template writes it."""
    chosen, rejected = ([{**GOOD[0], "reasoning_content": thought}] for thought in ("short", "long"))
    row = read(tmp_path, {"prompt": ASKED, "chosen": chosen, "rejected": rejected})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    forms = PromptEncoder(tokenizer, pairs=True).encode(row).forms
    texts = [tokenizer.decode(form.input_ids[form.prompt_length :]) for form in forms]
    assert texts == ["short:good</s>", "long:good</s>"]


def test_a_recipe_can_name_the_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for record in (*FORMS.values(), CHATS["two chats"]):
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        assert read_source(str(path), {}, format="preference") == read_source(str(path), {})
    path.write_text(json.dumps({"prompt": "Q", "chosen": "good"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no column 'rejected'"):
        read_source(str(path), {}, format="preference")


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


def test_the_oldest_turns_are_left_out_for_the_longer_answer(tmp_path: Path) -> None:
    row = read(tmp_path, {"prompt": BEFORE, "chosen": GOOD, "rejected": says(f"assistant: {'b' * 100}")})
    whole = PromptEncoder(byte_tokenizer(), "chat", pairs=True).encode(row)
    example = PromptEncoder(byte_tokenizer(), "chat", whole.length - 1, pairs=True).encode(row)
    assert example.cut
    assert not whole.cut
    chosen, rejected = example.forms
    assert (
        chosen.prompt
        == rejected.prompt
        == tuple(PromptEncoder(byte_tokenizer()).conversation([BEFORE[0], BEFORE[3]]))
    )
    assert len(rejected.input_ids) == example.length > len(chosen.input_ids)


def test_only_what_is_set_counts_in_a_hash() -> None:
    """A row without a rejected answer has the hash that it had before there were any."""
    row = Row("Q", "A", "C", "k", "p", "file, line 1")
    old = hashlib.sha256(json.dumps([[("Q", "A", "C", "k", "p")], []]).encode()).hexdigest()
    assert rows_hash(ClientRows((row,), ())) == old
    assert rows_hash(ClientRows((PAIR,), ())) != rows_hash(ClientRows((Row("Q", "good", passage="Q"),), ()))
