"""Reading rows: four file kinds, one result; every refusal says where."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.config.data import DataConfig
from flexperts.data.clients import load_clients, rows_hash
from flexperts.data.holdout import check_disjoint, hold_out, passage_key
from flexperts.data.rows import ClientRows, Row
from flexperts.data.sources import read_source
from flexperts.errors import DataError

Record = dict[str, Any]
RECORDS: list[Record] = [
    {"instruction": "Sum, up.", "context": 'A "long"\nnote', "response": "Short é", "category": "sum"},
    {"instruction": "Count", "context": "", "response": "3", "category": ""},
]
ROWS = [Row("Sum, up.", "Short é", 'A "long"\nnote', "sum", 'A "long"\nnote'), Row("Count", "3", "", "", "Count")]


def write_jsonl(path: Path, records: list[Record]) -> None:
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n\n")


def write_json(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, records: list[Record]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_parquet(path: Path, records: list[Record]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


WRITERS: dict[str, Callable[[Path, list[Record]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}
kinds = pytest.mark.parametrize("kind", WRITERS)


def refusal(path: Path, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        read_source(str(path), columns)
    return str(caught.value)


@kinds
def test_every_kind_reads_to_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, RECORDS)
    assert read_source(str(path), {}) == ROWS
    upper = path.rename(tmp_path / f"ROWS.{kind.upper()}")
    assert read_source(str(upper), {}) == ROWS


@kinds
def test_columns_with_other_names(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"question": "Q", "text": "P", "answer": "A", "category": "c", "context": "not this"}])
    columns = {"instruction": "question", "context": "text", "response": "answer"}
    assert read_source(str(path), columns) == [Row("Q", "A", "P", "c", "P")]


@kinds
def test_optional_columns_may_be_missing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"instruction": "Q", "response": "A"}])
    assert read_source(str(path), {}) == [Row("Q", "A", passage="Q")]


@kinds
def test_passage_is_named_by_its_column_else_by_the_context(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"instruction": "Q", "context": "C", "response": "A", "passage": "p1", "id": "7"}])
    assert read_source(str(path), {})[0].passage == "p1"
    assert read_source(str(path), {}, passage="id")[0].passage == "7"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, kind: str) -> None:
    """Spreadsheets put one before their CSV."""
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_source(str(path), {}) == ROWS


@kinds
def test_missing_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"none.{kind}"
    assert refusal(path).startswith(f"{path}: there is no such data file")


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.parquet.gz", "rows.jsonl.bz2", ".jsonl"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    assert "data files end in .csv, .json, .jsonl, .parquet" in refusal(tmp_path / name)


def test_bad_json_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n\n{broken\n")
    assert refusal(path).startswith(f"{path}, line 3, row 2: it is not valid JSON")
    path.write_text(json.dumps(RECORDS[0]) + "\n[1, 2]\n")
    assert refusal(path).startswith(
        f"{path}, line 2, row 2: it is not a JSON object: each line must hold one JSON object"
    )


@pytest.mark.parametrize("text", ["", "[{}", "{'a': 1}"])
def test_bad_json_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert "rows.json: it is not valid JSON" in refusal(tmp_path / "rows.json")


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"instruction": "a", "response": "b"}, null]', "3"])
def test_json_of_another_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert "it must contain a list of objects" in refusal(tmp_path / "rows.json")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_text_in_another_encoding(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"instruction": "caf@", "response": "b"}])
    path.write_bytes(path.read_bytes().replace(b"@", b"\xe9"))
    assert refusal(path).startswith(f"{path}: it is not")


def test_csv_row_with_more_cells_than_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,response\na,b\nwhat, when,c\n")
    assert refusal(path).startswith(f"{path}, line 3, row 2: it has more cells than the 2 columns")


def test_csv_row_with_fewer_cells_than_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,response\na\n")
    assert "line 2, row 1: it has fewer cells than the 2 columns" in refusal(path)


@pytest.mark.parametrize("size", [131_072, 131_073, 3_000_000])
def test_csv_cells_of_any_size(tmp_path: Path, size: int) -> None:
    """The csv module's limit is 131,072, for all of a process."""
    path = tmp_path / "rows.csv"
    path.write_text("instruction,response\na," + "b" * size + '\nc,"' + "d\n" * (size // 2) + '"\n')
    assert [len(row.response) for row in read_source(str(path), {})] == [size, size // 2 * 2]
    assert csv.field_size_limit() == 131_072


def test_parquet_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, RECORDS)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), len(whole) // 20), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert "it is not a readable Parquet file" in refusal(path)


def test_parquet_with_a_flipped_byte_reads_or_is_refused(tmp_path: Path) -> None:
    """Never another exception: Arrow raises three kinds of its own for damage."""
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"instruction": f"question {i}" * 9, "response": "é"} for i in range(40)])
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), len(whole) // 80):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_source(str(path), {})
        except DataError:
            refused += 1
    assert refused > 10


@kinds
@pytest.mark.parametrize("field", ["instruction", "response"])
def test_required_column_missing(tmp_path: Path, kind: str, field: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{**{k: v for k, v in RECORDS[0].items() if k != field}, "other": "x"}])
    said = refusal(path)
    assert said.startswith(f"{path}: no column '{field}' among [")
    assert f"the {field} is required" in said
    assert "'other'" in said
    assert "no column 'wrong' among" in refusal(path, **{field: "wrong"})


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("context", ["a"], "a list"),
        ("instruction", True, "true or false"),
        ("response", {"private": "text"}, "an object"),
        ("category", False, "true or false"),
        ("response", float("nan"), "not a finite number"),
        ("context", float("inf"), "not a finite number"),
        ("instruction", [{"role": "user", "content": "private"}], "a list of objects, such as a chat"),
    ],
)
def test_values_must_be_text(tmp_path: Path, kind: str, field: str, value: Any, shown: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{**RECORDS[0], field: value}])
    assert f"row 1: {field} is {shown}: it must be text or a number" in refusal(path)
    assert "private" not in refusal(path)


@kinds
@pytest.mark.parametrize("field", ["instruction", "response"])
@pytest.mark.parametrize("empty", ["", " \n"])
def test_required_value_empty(tmp_path: Path, kind: str, field: str, empty: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [RECORDS[0], {**RECORDS[1], field: empty}])
    assert f"row 2: {field} is empty: the {field} must contain text" in refusal(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_null_is_empty(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{**RECORDS[1], "context": None}])
    assert read_source(str(path), {}) == [ROWS[1]]
    WRITERS[kind](path, [{**RECORDS[1], "response": None}])
    assert "response is empty" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "\n"), ("a.json", "[]"), ("a.csv", "instruction,response\n")]
)
def test_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert "a split needs at least one row" in refusal(tmp_path / name)


# Splitting by passage


def row(number: int, passage: str) -> Row:
    return Row(f"question {number}", "answer", passage=passage)


PASSAGES = st.lists(st.text(max_size=3), min_size=2, max_size=40)


@given(PASSAGES, st.floats(0.01, 0.99), st.integers(0, 9))
def test_a_passage_is_never_split(passages: list[str], fraction: float, seed: int) -> None:
    rows = [row(i, p) for i, p in enumerate(passages)]
    count = len({passage_key(p) for p in passages})
    wanted = round(fraction * count)
    if wanted in (0, count):
        with pytest.raises(DataError, match="at least one passage each"):
            hold_out(rows, fraction, seed, "bank")
        return
    sides = hold_out(rows, fraction, seed, "bank")
    train, test = ({passage_key(r.passage) for r in side} for side in (sides.train, sides.test))
    assert not train & test
    assert len(test) == wanted
    assert sorted((*sides.train, *sides.test), key=rows.index) == rows


@given(st.integers(0, 10**6))
def test_the_split_does_not_depend_on_the_order(shuffle: int) -> None:
    rows = [row(i, f"p{i // 2}") for i in range(20)]
    shuffled = random.Random(shuffle).sample(rows, len(rows))
    one, other = hold_out(rows, 0.3, 5, "bank"), hold_out(shuffled, 0.3, 5, "bank")
    assert set(one.train) == set(other.train)
    assert set(one.test) == set(other.test)
    assert list(other.test) == [r for r in shuffled if r in one.test]


def test_the_split_depends_on_the_seed_and_not_on_the_client() -> None:
    rows = [row(i, f"p{i}") for i in range(30)]
    assert hold_out(rows, 0.3, 0, "a") == hold_out(rows, 0.3, 0, "b")
    assert hold_out(rows, 0.3, 0, "a") != hold_out(rows, 0.3, 1, "a")


def test_a_passage_more_leaves_the_others_order_alone() -> None:
    """Chosen by hash, not by a draw over all: new rows move few old ones across."""
    rows = [row(i, f"p{i}") for i in range(40)]
    before = {r.passage for r in hold_out(rows, 0.5, 0, "a").test}
    after = {r.passage for r in hold_out([*rows, row(40, "new")], 0.5, 0, "a").test}
    assert len(before ^ (after - {"new"})) <= 1


def test_shared_passage_is_refused() -> None:
    sides = ClientRows((row(1, "p"), row(2, "q")), (row(3, "q"),))
    with pytest.raises(
        DataError, match="bank: 1 passages are in train and in test, such as test row 1 and train row 2: a"
    ):
        check_disjoint(sides, "bank")
    good = ClientRows((row(1, "p"),), (row(3, "q"),))
    assert check_disjoint(good, "bank") is good


# Clients


def files(tmp_path: Path, name: str, count: int, side: str = "x") -> str:
    path = tmp_path / f"{name}-{side}.jsonl"
    write_jsonl(path, [{"instruction": f"{side} {i}", "response": "a"} for i in range(count)])
    return str(path)


def test_clients_come_sorted_with_their_own_rows(tmp_path: Path) -> None:
    data = {
        "shop": {"train": files(tmp_path, "shop", 10)},
        "bank": {"train": files(tmp_path, "bank", 3, "train"), "test": files(tmp_path, "bank", 2, "test")},
    }
    clients = load_clients(DataConfig.model_validate({"clients": data}), seed=0)
    assert list(clients) == ["bank", "shop"]
    assert [len(side) for side in (clients["shop"].train, clients["shop"].test)] == [8, 2]
    assert [r.instruction for r in clients["bank"].test] == ["test 0", "test 1"]


def test_a_folder_of_clients(tmp_path: Path) -> None:
    for name in ("shop", "bank"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [{"instruction": f"t{i}", "response": "a"} for i in range(5)])
    write_jsonl(tmp_path / "bank" / "test.jsonl", [{"instruction": "test", "response": "a"}])
    clients = load_clients(DataConfig(folder=str(tmp_path)), seed=0)
    assert {n: (len(c.train), len(c.test)) for n, c in clients.items()} == {"bank": (5, 1), "shop": (4, 1)}


def test_a_folder_without_clients(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it must contain <client>/train\.jsonl files"):
        load_clients(DataConfig(folder=str(tmp_path / "none")), seed=0)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "a b", "a\nb", "a\\b"])
def test_client_names_must_be_file_names(tmp_path: Path, name: str) -> None:
    config = DataConfig.model_validate({"clients": {name: {"train": files(tmp_path, "x", 10)}}})
    with pytest.raises(DataError, match="a client's name is letters, digits"):
        load_clients(config, seed=0)


def test_too_few_passages(tmp_path: Path) -> None:
    config = DataConfig.model_validate({"clients": {"bank": {"train": files(tmp_path, "x", 1)}}})
    with pytest.raises(DataError, match=r"bank: 1 passages with test_fraction = 0\.2: train and test need"):
        load_clients(config, seed=0)


def test_training_on_a_test_passage_is_refused(tmp_path: Path) -> None:
    same = files(tmp_path, "x", 3)
    config = DataConfig.model_validate({"clients": {"bank": {"train": same, "test": same}}})
    with pytest.raises(DataError, match="bank: 3 passages are in train and in test"):
        load_clients(config, seed=0)


def test_empty_test_file(tmp_path: Path) -> None:
    files_of_bank = {"train": files(tmp_path, "a", 3), "test": files(tmp_path, "b", 0)}
    with pytest.raises(DataError, match="a split needs at least one row"):
        load_clients(DataConfig.model_validate({"clients": {"bank": files_of_bank}}), seed=0)


def test_local_files_are_read_without_a_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private rows must not be copied elsewhere on the disk."""
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails from here on
    for kind, write in WRITERS.items():
        write(tmp_path / f"rows.{kind}", RECORDS)
        read_source(str(tmp_path / f"rows.{kind}"), {})
    assert {p.name for p in tmp_path.iterdir()} == {f"rows.{kind}" for kind in WRITERS}
    with pytest.raises(ImportError):
        read_source("hub:org/name", {})


def test_rows_hash_names_the_rows() -> None:
    rows = ClientRows((row(1, "p"),), (row(2, "q"),))
    assert rows_hash(rows) == rows_hash(ClientRows((row(1, "p"),), (row(2, "q"),)))
    others = [
        ClientRows(rows.test, rows.train),
        ClientRows((row(1, "p"), row(2, "q")), ()),
        ClientRows((row(1, "r"),), (row(2, "q"),)),
    ]
    assert len({rows_hash(r) for r in [rows, *others]}) == 4


def test_a_hub_data_set_is_read_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {
        "instruction": ["Q", "R", None],
        "input": ["C", "", "D"],
        "output": [1.5, 2.0, 3.0],
        "id": [0, 1, 2],
        "unusable": [[1], [2], [3]],
    }
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    notes: list[str] = []
    found = read_source("hub:org/name:dev", {}, on_bad_row="drop", say=notes.append)
    assert found == [Row("Q", "1.5", "C", "", "C"), Row("R", "2.0", "", "", "R")]
    assert [row.where for row in found] == ["hub:org/name, row 1", "hub:org/name, row 2"]
    assert asked == [("org/name", "dev")]
    assert notes == [
        "hub:org/name: 1 of 3 rows are left out (data.on_bad_row = 'drop'): row 3: instruction is empty",
        "hub:org/name: context is read from 'input', response is read from 'output'; "
        "unused columns: 'id', 'unusable'",
        "hub:org/name: numbers are used as text, exactly as written (response of 2 rows)",
    ]
    with pytest.raises(DataError, match=r"hub:org/name, row 3: instruction is empty"):
        read_source("hub:org/name", {})
