"""Facts about rows: every number counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexperts.config.data import DataConfig
from flexperts.data.check import (
    Lengths,
    differences,
    file_facts,
    lengths_of,
    parts,
    scripts,
    short_line,
    silo_facts,
    spread,
)
from flexperts.data.prompts import Example
from flexperts.data.rows import ClientRows, Row

NONE = Lengths((), (), 0)


def rows(*texts: str, category: str = "") -> tuple[Row, ...]:
    return tuple(Row(f"Question {text}", f"Answer {text}", category=category) for text in texts)


def test_spread_gives_values_that_occur() -> None:
    assert spread(range(1, 101)) == {"p50": 50, "p95": 95, "max": 100}
    assert spread([7, 3]) == {"p50": 3, "p95": 7, "max": 7}
    assert spread([]) == {"p50": 0, "p95": 0, "max": 0}


def test_lengths_and_parts_of_examples() -> None:
    examples = [Example((1, 2, 3, 4, 5), 2), Example((1, 2, 3), 1, cut=True)]
    assert lengths_of(examples) == Lengths((5, 3), (2, 1), 1)
    assert parts(examples[0]) == [(False, (1, 2)), (True, (3, 4, 5))]


def test_duplicates_are_counted_within_and_across_splits() -> None:
    train = (*rows("a", "b", "a", "a"), Row("question  A", "“answer” a"), Row("Question b", "another"))
    test = rows("b", "c", "c")
    validation = rows("a", "d")
    lengths = {"train": Lengths((9,) * 6, (4,) * 6, 2), "test": Lengths((8,) * 3, (3, 5, 7), 0)}
    found = silo_facts(ClientRows(train, test, validation), lengths | {"validation": Lengths((1, 1), (9, 9), 0)}, 5)
    assert found["rows"] == {"train": 6, "test": 3, "validation": 2}
    assert found["duplicates"] == {"train": 2, "test": 1, "validation": 0}
    assert found["also_in_train"] == 2
    assert found["longer"] == {"train": 0, "test": 1, "validation": 2}
    assert found["cut"] == 2
    assert found["tokens"] == {"p50": 9, "p95": 9, "max": 9}


def test_case_spaces_and_quotes_do_not_make_a_row_another() -> None:
    twice = (Row("Say “it”", "Yes  sir"), Row('say "IT"', "yes sir"))
    found = silo_facts(
        ClientRows(twice, ()), {"train": Lengths((1, 1), (1, 1), 0), "test": NONE, "validation": NONE}, 9
    )
    assert found["duplicates"]["train"] == 1


def test_empty_answers_and_categories() -> None:
    train = (Row("q1", "--"), Row("q2", "42", category="b"), Row("q3", "?!", category="b"), Row("q4", "é"))
    lengths = {"train": Lengths((1,) * 4, (1,) * 4, 0), "test": NONE, "validation": NONE}
    found = silo_facts(ClientRows(train, ()), lengths, 9)
    assert found["empty"] == 2
    assert found["categories"] == {"": 2, "b": 2}


def test_languages_by_script() -> None:
    assert scripts(["abc", "가나다 ", "д12!"]) == {"Latin": 0.4286, "Hangul": 0.4286, "Cyrillic": 0.1429}
    assert scripts(["日本語のテキスト"]) == {"Katakana": 0.5, "Han": 0.375, "Hiragana": 0.125}
    assert scripts(["𐌰𐌱"]) == {"other": 1.0}  # Gothic
    assert scripts(["12 !?", ""]) == {}


def test_how_silos_differ_by_labels_and_lengths() -> None:
    clients = {
        "a": ClientRows(rows("1", "2", category="x") + rows("3", "4", category="y"), ()),
        "b": ClientRows(rows("1", "2", "3", category="x") + rows("4", category="z"), ()),
        "c": ClientRows(rows("1", category="w"), ()),
    }
    lengths = {
        "a": {"train": Lengths((1, 2, 3, 4), (1, 1, 1, 1), 0)},
        "b": {"train": Lengths((3, 4, 5, 6), (1, 1, 1, 1), 0)},
        "c": {"train": Lengths((9,), (1,), 0)},
    }
    found = differences(clients, lengths)
    # a has x 1/2, y 1/2; the others have x 3/5, z 1/5, w 1/5: (1/10 + 1/2 + 1/5 + 1/5) / 2.
    assert found["a"]["labels"] == 0.5
    assert found["c"]["labels"] == 1.0
    # At length 2, half of a and none of the others; at 4, all of a and 2 of 5 others.
    assert found["a"]["tokens"] == 0.6
    assert found["c"]["tokens"] == 1.0
    assert {its["answer_tokens"] for its in found.values()} == {0.0}


def test_without_categories_labels_do_not_differ() -> None:
    clients = {name: ClientRows(rows("1"), ()) for name in "ab"}
    found = differences(clients, {name: {"train": Lengths((1,), (1,), 0)} for name in "ab"})
    assert found["a"] == {"labels": None, "tokens": 0.0, "answer_tokens": 0.0}


def test_the_short_line_of_a_run() -> None:
    clients = {"a": ClientRows(rows("1", "1", "2"), ()), "b": ClientRows(rows("1"), ())}
    lengths = {"a": {"train": Lengths((10, 10, 40), (1, 1, 1), 1)}, "b": {"train": Lengths((20,), (1,), 0)}}
    assert short_line(clients, lengths, 64) == (
        "tokens of a row: 10 (p50), 40 (p95), 40 (max), of at most 64; 1 of them cut; "
        "1 train rows repeat another of their silo"
    )


def test_columns_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,id\nq,a,1\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "q", "output": "a", "x": 1}) + "\n")
    (tmp_path / "c.csv").write_text("foo,bar\n1,2\n")
    config = DataConfig.model_validate(
        {
            "clients": {
                "a": {
                    "train": str(tmp_path / "a.csv"),
                    "columns": {"instruction": "question", "response": "answer"},
                },
                "b": {"train": str(tmp_path / "b.jsonl"), "test": str(tmp_path / "c.csv")},
                "gone": {"train": str(tmp_path / "none.csv")},
            },
            "leave_out": ["gone"],
        }
    )
    first, second, third = file_facts(config)
    assert (first["silo"], first["split"], first["unused"]) == ("a", "train", ["id"])
    assert first["columns"] == {"instruction": "question", "response": "answer"}
    assert second["columns"] == {"instruction": "instruction", "response": "output"}
    assert third == {"silo": "b", "split": "test", "source": str(tmp_path / "c.csv")}


@pytest.mark.parametrize("by", ["iid", "pathological"])
def test_columns_of_a_pooled_file(tmp_path: Path, by: str) -> None:
    (tmp_path / "p.csv").write_text("instruction,response,dept,id\nq,a,x,1\n")
    pool = {"source": str(tmp_path / "p.csv"), "by": by, "clients": 2}
    [found] = file_facts(
        DataConfig.model_validate({"partition": pool | ({} if by == "iid" else {"column": "dept"})})
    )
    assert found["silo"] is None
    assert found["unused"] == (["dept", "id"] if by == "iid" else ["id"])
