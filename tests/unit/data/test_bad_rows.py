"""Rows that cannot be used: all of them are told at once, by line, without a word of their text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.data import DataConfig
from flexperts.data.bad_rows import BadRow, settle_bad_rows
from flexperts.data.clients import Clients, load_clients
from flexperts.data.sources import read_source
from flexperts.errors import DataError
from flexperts.recipe import parse_recipe

SECRET = "Jane Doe has the flu"


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def good(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"q{number}", "response": f"a{number}", **more}


BAD: list[Any] = [
    {"instruction": SECRET},
    {"instruction": SECRET, "response": ""},
    {"instruction": SECRET, "response": None},
    {"instruction": SECRET, "response": "x", "context": [SECRET]},
    {"instruction": SECRET, "response": "\ud800"},
    {"instruction": SECRET, "response": "x", "passage": {"is": SECRET}},
    f'{{"instruction": "{SECRET}", "response": "x", "response": "y"}}',
    f'{{"instruction": "{SECRET}", "respon',
    f'"{SECRET}"',
    f"[{SECRET}]",
    '{"instruction": "q", "response": NaN}',
]
REASONS = [
    "no response",
    "response is empty",
    "response is empty",
    "context is a list",
    "response contains half of a character",
    "passage is an object",
    "'response' is repeated",
    "it is not valid JSON (Unterminated string starting at at column 41)",
    "it is not a JSON object",
    "it is not valid JSON (Expecting value at column 2)",
    "response is not a finite number",
]


@pytest.mark.parametrize(("bad", "reason"), list(zip(BAD, REASONS, strict=True)))
def test_a_bad_row_among_good_ones(tmp_path: Path, bad: Any, reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", good(1), "", bad, good(2))
    with pytest.raises(DataError) as caught:
        read_source(str(path), {})
    assert str(caught.value).startswith(f"{path}, line 3, row 2: {reason}: ")
    assert str(caught.value).endswith(
        "correct this row in the source, or have such rows left out with data.on_bad_row = 'drop'"
    )
    notes: list[str] = []
    rows = read_source(str(path), {}, on_bad_row="drop", say=notes.append)
    assert [(row.instruction, row.where) for row in rows] == [
        ("q1", f"{path}, line 1, row 1"),
        ("q2", f"{path}, line 4, row 3"),
    ]
    assert notes == [f"{path}: 1 of 3 rows are left out (data.on_bad_row = 'drop'): line 3, row 2: {reason}"]
    assert "Doe" not in str(caught.value) + notes[0]


def test_all_bad_rows_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", good(1), *BAD, good(2), *BAD)
    with pytest.raises(DataError) as caught:
        read_source(str(path), {})
    said = str(caught.value)
    assert said.startswith(f"{path}: 22 of 24 rows cannot be used: line 2, row 2: no response; line 3, row 3: ")
    assert "line 11, row 11: " in said
    assert "and 12 more" in said
    assert "Doe" not in said
    assert len(read_source(str(path), {}, on_bad_row="drop")) == 2


@pytest.mark.parametrize("on_bad_row", ["refuse", "drop"])
@pytest.mark.parametrize("count", [1, 2, 11])
def test_a_file_without_a_good_row_is_refused(tmp_path: Path, on_bad_row: Any, count: int) -> None:
    path = write(tmp_path / "rows.jsonl", *BAD[1 : 1 + count], *BAD[1:2] * (count - 10))
    with pytest.raises(DataError) as caught:
        read_source(str(path), {}, on_bad_row=on_bad_row)
    assert caught.value.remedy == (
        f"correct {'this row' if count == 1 else 'these rows'} in the source"
    )  # dropping is no remedy


def test_rows_of_elsewhere_are_settled_alike() -> None:
    """Such as rows that are too long, which only the base's tokenizer can tell."""
    bad = [BadRow("a.csv, line 3, row 2", "900 tokens", "at most 512"), BadRow("b.csv, row 1", "800 tokens", "")]
    notes: list[str] = []
    settle_bad_rows("clinic", [], 5, "refuse", notes.append)
    settle_bad_rows("clinic", bad, 5, "drop", notes.append)
    assert notes == [
        "clinic: 2 of 5 rows are left out (data.on_bad_row = 'drop'): "
        "a.csv, line 3, row 2: 900 tokens; b.csv, row 1: 800 tokens"
    ]
    with pytest.raises(DataError, match="clinic: 2 of 5 rows cannot be used"):
        settle_bad_rows("clinic", bad, 5, "refuse")
    with pytest.raises(DataError, match=r"correct these rows in the source$"):
        settle_bad_rows("clinic", bad, 5, None)


def clients(data: str, folder: Path) -> tuple[Clients, list[str]]:
    notes: list[str] = []
    config = parse_recipe(data, folder=folder)
    return load_clients(config.data, config.seed, notes.append), notes


def test_lines_name_client_and_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *(good(i, id=i) for i in range(8)), BAD[0])
    recipe = "[data]\ntest_fraction = 0.5\non_bad_row = 'drop'\n[data.clients.ward]\ntrain = 'a.jsonl'\n"
    found, notes = clients(recipe, tmp_path)
    assert len(found["ward"].train) + len(found["ward"].test) == 8
    assert notes == [
        f"ward: {tmp_path / 'a.jsonl'}: "
        "1 of 9 rows are left out (data.on_bad_row = 'drop'): line 9, row 9: no response",
        f"ward: {tmp_path / 'a.jsonl'}: unused columns: 'id'",
    ]
    with pytest.raises(DataError, match=rf"^ward: {tmp_path / 'a.jsonl'}, line 9, row 9: no response"):
        clients(recipe.replace("drop", "refuse"), tmp_path)


@pytest.mark.parametrize(
    "by", ["by = 'natural'\ncolumn = 'ward'", "by = 'pathological'\nclients = 2\ncolumn = 'ward'"]
)
def test_a_pooled_set_keeps_rows_and_labels_together(tmp_path: Path, by: str) -> None:
    records = [good(i, ward=f"w{i % 2}") for i in range(40)]
    records[7] = {"instruction": SECRET, "ward": "w1"}  # no response
    records[12] = good(12, ward=None)
    records[13] = good(13, ward=1.5)
    records[25] = good(25)
    write(tmp_path / "pool.jsonl", *records)
    recipe = f"[data]\non_bad_row = 'drop'\n[data.partition]\nsource = 'pool.jsonl'\n{by}"
    found, notes = clients(recipe, tmp_path)
    assert len(found) == 2
    for name, rows in found.items():
        for row in (*rows.train, *rows.test):
            assert name == f"w{int(row.instruction[1:]) % 2}"
            assert row.where.endswith(f"line {int(row.instruction[1:]) + 1}, row {int(row.instruction[1:]) + 1}")
    assert sum(len(rows.train) + len(rows.test) for rows in found.values()) == 36
    assert len(notes) == 1
    assert "pool.jsonl: 4 of 40 rows are left out" in notes[0]
    with pytest.raises(DataError, match="4 of 40 rows cannot be used") as caught:
        clients(recipe.replace("drop", "refuse"), tmp_path)
    assert "line 13, row 13: ward is empty" in str(caught.value)
    assert "line 14, row 14: ward is not a whole number" in str(caught.value)


def test_test_rows_of_no_client_are_bad_rows(tmp_path: Path) -> None:
    write(tmp_path / "pool.jsonl", *(good(i, ward=f"w{i % 2}") for i in range(20)))
    tests = [good(100, ward="w0"), good(101, ward="Mr. Smith"), good(102, ward="w1")]
    write(tmp_path / "test.jsonl", *tests)
    recipe = "[data]\non_bad_row = 'refuse'\n[data.partition]\nsource = 'pool.jsonl'\ntest = 'test.jsonl'\n"
    recipe += "by = 'natural'\ncolumn = 'ward'"
    with pytest.raises(DataError, match=r"test.jsonl, line 2, row 2: its ward occurs in no train row") as caught:
        clients(recipe, tmp_path)
    assert "Smith" not in str(caught.value)
    found, notes = clients(recipe.replace("refuse", "drop"), tmp_path)
    assert [row.instruction for rows in found.values() for row in rows.test] == ["q100", "q102"]
    assert notes == [
        f"{tmp_path / 'test.jsonl'}: 1 of 3 rows are left out (data.on_bad_row = 'drop'): "
        "line 2, row 2: its ward occurs in no train row"
    ]


def test_the_setting_has_two_values() -> None:
    with pytest.raises(ValueError, match="on_bad_row"):
        DataConfig.model_validate({"silos": {}, "on_bad_row": "skip"})
