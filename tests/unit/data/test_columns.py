"""Which column fills which field: the recipe's words first, then names that are known; never a guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flexperts.data.rows import Row
from flexperts.data.sources import read_source
from flexperts.errors import ConfigError, DataError
from flexperts.recipe import parse_recipe


def read(folder: Path, record: dict[str, Any], columns: dict[str, str]) -> tuple[Row, list[str]]:
    notes: list[str] = []
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (row,) = read_source(str(path), columns, say=notes.append)
    return row, [note.removeprefix(f"{path}: ") for note in notes]


def refusal(folder: Path, record: dict[str, Any], columns: dict[str, str]) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, record, columns)
    return str(caught.value).removeprefix(f"{folder / 'rows.jsonl'}: ")


ALPACA = {"instruction": "Q", "input": "C", "output": "A"}


@pytest.mark.parametrize(
    ("record", "columns", "expected", "note"),
    [
        (ALPACA, {}, Row("Q", "A", "C"), "context is read from 'input', response is read from 'output'"),
        (ALPACA, {"response": "output"}, Row("Q", "A", "C"), "context is read from 'input'"),
        (ALPACA, {"context": "input"}, Row("Q", "A", "C"), "response is read from 'output'"),
        (ALPACA, {"instruction": "input"}, Row("C", "A"),
         "response is read from 'output'; unused columns: 'instruction'"),
        (ALPACA, {"response": "output", "context": ""}, Row("Q", "A"), "unused columns: 'input'"),
        ({**ALPACA, "text": "T"}, {}, Row("Q", "A", "C"),
         "context is read from 'input', response is read from 'output'; unused columns: 'text'"),
        ({**ALPACA, "mine": "B"}, {"response": "mine"}, Row("Q", "B", "C"),
         "context is read from 'input'; unused columns: 'output'"),
        ({"instruction": "Q", "input": "C", "mine": "B"}, {"response": "mine"}, Row("Q", "B", "C"),
         "context is read from 'input'"),
        ({"prompt": "Q", "completion": "A"}, {}, Row("Q", "A"),
         "instruction is read from 'prompt', response is read from 'completion'"),
        ({"prompt": "Q", "response": "A"}, {}, Row("Q", "A"), "instruction is read from 'prompt'"),
        ({"prompt": "Q", "completion": "A", "id": 3}, {"instruction": "prompt", "response": "completion"},
         Row("Q", "A"), "unused columns: 'id'"),
        ({"instruction": "Q", "context": "C", "response": "A", "category": "k"}, {}, Row("Q", "A", "C", "k"), None),
        ({"instruction": "Q", "context": "C", "response": "A", "input": "no", "output": "no", "prompt": "no"}, {},
         Row("Q", "A", "C"), "unused columns: 'input', 'output', 'prompt'"),
        ({"instruction": "Q", "response": "A", "messages": []}, {}, Row("Q", "A"),
         "unused columns: 'messages'"),
    ],
)  # fmt: skip
def test_known_columns_fill_what_the_recipe_leaves_open(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str], expected: Row, note: str | None
) -> None:
    row, notes = read(tmp_path, record, columns)
    fields = ("instruction", "context", "response", "category")
    assert [getattr(row, f) for f in fields] == [getattr(expected, f) for f in fields]
    assert notes == ([note] if note else [])


@pytest.mark.parametrize(
    ("record", "columns", "remedy"),
    [
        ({"question": "q", "answer": "a"}, {},
         ", such as instruction = 'question', response = 'answer', or add it"),
        ({"Instruction": "q", "Response": "a"}, {},
         ", such as instruction = 'Instruction', response = 'Response', or add it"),
        ({"instruction": "q", "input": "c"}, {}, ", or add it"),
        ({"instruction": "q", "context": "c", "id": "1"}, {}, ", or add it"),
        ({"instruction": "q", "reply": "c"}, {}, ", such as response = 'reply', or add it"),
        (ALPACA, {"response": "outptu"}, ", such as response = 'output', or add it"),
        (ALPACA, {"response": "instructions"}, ", such as response = 'output', or add it"),
        (ALPACA, {"context": "notes"}, ", such as context = 'input', or add it"),
        ({"input": "q", "output": "a"}, {}, ", such as instruction = 'input', or add it"),
        ({"question": "q", "answer": "a"}, {"response": "answer"}, ", such as instruction = 'question', or add it"),
        ({"question": "q", "text": "a"}, {"instruction": "question"}, ", or add it"),
    ],
)  # fmt: skip
def test_hints_name_a_column_only_where_it_helps(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str], remedy: str
) -> None:
    """Never one that is used, nor one by which the model would learn to repeat the question."""
    assert refusal(tmp_path, record, columns).endswith("name the column under [data.columns]" + remedy)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"instruction": "q", "output": "a", "completion": "b"},
         "columns 'output', 'completion': each of them may be the response"),
        ({"prompt": "q", "output": "a", "completion": "b"},
         "columns 'output', 'completion': each of them may be the response"),
    ],
)  # fmt: skip
def test_two_columns_that_may_be_meant(tmp_path: Path, record: dict[str, Any], named: str) -> None:
    assert refusal(tmp_path, record, {}).startswith(named)
    assert read(tmp_path, record, {"response": "completion"})[0].response == "b"


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_chats_without_an_answer_are_refused_as_such(tmp_path: Path, column: str) -> None:
    said = refusal(tmp_path, {"id": "1", column: [{"role": "user", "content": "private"}]}, {})
    assert "the chat has no answer to a user" in said
    assert "private" not in said


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("{response = 'text', instruction = 'text'}", "columns maps two fields to 'text'"),
        ("{context = 'instruction', instruction = 'instruction'}", "columns maps two fields to 'instruction'"),
        ("{response = ''}", "columns maps response to nothing"),
    ],
)
def test_one_column_fills_one_field(columns: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_recipe(f"[data]\ncolumns = {columns}\n[data.silos]")


def test_a_response_from_the_instructions_column_leaves_no_instruction(tmp_path: Path) -> None:
    assert "no column 'instruction'" in refusal(
        tmp_path, {"instruction": "q", "context": "c"}, {"response": "instruction"}
    )


# Numbers


@pytest.mark.parametrize(
    ("written", "text"),
    [("3", "3"), ("3.10", "3.10"), ("-0.50", "-0.50"), ("1e400", "1e400"), ("0", "0"), ("9" * 5000, "9" * 5000)],
)
def test_numbers_are_text_as_they_are_written(tmp_path: Path, written: str, text: str) -> None:
    path, notes = tmp_path / "rows.jsonl", list[str]()
    path.write_text(f'{{"instruction": "q", "response": {written}}}\n{{"instruction": "q", "response": "many"}}\n')
    rows = read_source(str(path), {}, say=notes.append)
    assert [(row.response, type(row.response)) for row in rows] == [(text, str), ("many", str)]
    assert notes == [f"{path}: numbers are used as text, exactly as written (response of 1 rows)"]
    path.with_suffix(".json").write_text(f'[{{"instruction": {written}, "response": "a", "context": {written}}}]')
    (row,) = read_source(str(path.with_suffix(".json")), {})
    assert (row.instruction, row.context) == (text, text)


@pytest.mark.parametrize(
    ("kind", "values", "texts"),
    [
        ("int64", [3, 40], ["3", "40"]),
        ("uint8", [0, 255], ["0", "255"]),
        ("float32", [0.1, 2.5], ["0.1", "2.5"]),
        ("float64", [0.1, 3.0], ["0.1", "3"]),
    ],
)
def test_numbers_of_parquet(tmp_path: Path, kind: str, values: list[Any], texts: list[str]) -> None:
    column = pyarrow.array(values, getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(
        pyarrow.table({"instruction": ["a", "b"], "response": column}), tmp_path / "rows.parquet"
    )
    assert [row.response for row in read_source(str(tmp_path / "rows.parquet"), {})] == texts


def test_a_passage_that_is_called_zero_is_one(tmp_path: Path) -> None:
    row, _ = read(tmp_path, {"instruction": "q", "response": "a", "context": "c", "passage": 0}, {})
    assert row.passage == "0"


# Parquet reads what it needs


@pytest.mark.parametrize("name", ["seconds", "input", "output", "prompt"])
@pytest.mark.parametrize(
    "unusable",
    [
        pyarrow.array([2**62, 1], pyarrow.duration("s")),
        pyarrow.array([2**40, 1], pyarrow.timestamp("s")),
        pyarrow.array([[1], None], pyarrow.list_(pyarrow.int8())),
        pyarrow.array([b"\xff", None], pyarrow.binary()),
    ],
)
def test_an_unused_column_may_hold_anything(tmp_path: Path, name: str, unusable: Any) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"instruction": ["a", "b"], "context": ["c", "d"], "response": ["e", "f"], name: unusable}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    notes: list[str] = []
    assert read_source(str(path), {}, say=notes.append) == [
        Row("a", "e", "c", "", "c"),
        Row("b", "f", "d", "", "d"),
    ]
    assert notes == [f"{path}: unused columns: {name!r}"]
    with pytest.raises(DataError, match=r"of type|2 of 2 rows cannot be used"):
        read_source(str(path), {"response": name})


def test_a_parquet_column_that_comes_twice(tmp_path: Path) -> None:
    arrays = [pyarrow.array([c]) for c in "abc"]
    table = pyarrow.Table.from_arrays(arrays, names=["instruction", "response", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="'response': column names must be unique"):
        read_source(str(tmp_path / "rows.parquet"), {})


def test_parquet_rows_are_counted_over_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = [f"q{i}" for i in range(1, 8)]
    responses = ["a"] * 4 + [""] + ["a"] * 2
    pyarrow.parquet.write_table(
        pyarrow.table({"instruction": texts, "response": responses}), path, row_group_size=2
    )
    rows = read_source(str(path), {}, on_bad_row="drop")
    assert [row.where for row in rows] == [f"{path}, row {i}" for i in (1, 2, 3, 4, 6, 7)]
    assert [row.instruction for row in rows] == ["q1", "q2", "q3", "q4", "q6", "q7"]
