"""Passages compared as people read them, and contexts that are none."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.config.data import DataConfig
from flexperts.data.clients import load_clients, rows_hash
from flexperts.data.holdout import check_disjoint, hold_out, passage_key
from flexperts.data.rows import ClientRows, Row
from flexperts.data.silos.generate import SILOS, generate_silo
from flexperts.errors import DataError
from flexperts.seeding import derive_seed

NOTE = "Patient Müller, 58, hat Fieber.\nEs geht ihm „besser“ – seit heute."
SPELLINGS = {
    "CRLF": NOTE.replace("\n", "\r\n"),
    "CR": NOTE.replace("\n", "\r"),
    "one line": NOTE.replace("\n", " "),
    "blanks at the end": NOTE.replace("\n", "  \n") + " \n\n",
    "blanks in front": "\t  " + NOTE,
    "NFD": unicodedata.normalize("NFD", NOTE),
    "NBSP": NOTE.replace(" ", "\u00a0"),
    "thin space": NOTE.replace(" ", "\u2009"),
    "ideographic space": NOTE.replace(" ", "\u3000"),
    "upper case": NOTE.upper(),
    "lower case": NOTE.lower(),
    "BOM": "\ufeff" + NOTE,
    "zero width": NOTE.replace("Müller", "Mül\u200bler"),
    "soft hyphen": NOTE.replace("Fieber", "Fie\u00adber"),
    "joiner": NOTE.replace("Fieber", "Fie\u2060ber"),
    "line separator": NOTE.replace("\n", "\u2028"),
    "next line": NOTE.replace("\n", "\x85"),
    "form feed": NOTE.replace("\n", "\f"),
    "straight quotes": NOTE.replace("„", '"').replace("“", '"'),
    "double hyphen": NOTE.replace("–", "-"),
    "em dash": NOTE.replace("–", "—"),
    "fullwidth digits": NOTE.replace("58", "５８"),
    "control": NOTE.replace("hat", "\x00hat\x08"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_reads_the_same_is_the_same(spelling: str) -> None:
    assert SPELLINGS[spelling] != NOTE
    assert passage_key(SPELLINGS[spelling]) == passage_key(NOTE)


@pytest.mark.parametrize(
    "other",
    [
        NOTE.replace("58", "59"),
        NOTE.replace("ü", "u"),
        NOTE.replace("hat Fieber", "hatFieber"),
        NOTE.replace("heute", "heute abend"),
        NOTE[:-1],
    ],
)
def test_what_reads_otherwise_is_another(other: str) -> None:
    assert passage_key(other) != passage_key(NOTE)


@given(st.text(max_size=30))
def test_a_key_is_its_own_key(text: str) -> None:
    key = passage_key(text)
    assert passage_key(key) == key


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_trained_passage_in_another_spelling_is_no_test_passage(tmp_path: Path, spelling: str) -> None:
    with pytest.raises(DataError, match=r"bank: 1 passages are in train and in test") as refused:
        load(tmp_path, [NOTE, "b"], [SPELLINGS[spelling], "c"])
    told = str(refused.value)
    assert "test.jsonl, line 1, row 1 and " in told
    assert "train.jsonl, line 1, row 1:" in told
    assert not {"Patient", "patient", "PATIENT", "ieber"} & set(told.replace("'", " ").split())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_passage_lie_on_one_side(spelling: str) -> None:
    others = [Row(f"q{i}", "a", context=f"note {i}", passage=f"note {i}") for i in range(9)]
    pair = [Row("x", "a", text, passage=text) for text in (NOTE, SPELLINGS[spelling])]
    sides = [hold_out([*others, *order], 0.5, seed, "bank") for seed in range(8) for order in (pair, pair[::-1])]
    for one, two in zip(sides[::2], sides[1::2], strict=True):
        assert set(pair) <= set(one.train) or set(pair) <= set(one.test)
        assert set(one.test) == set(two.test)
        assert len({passage_key(r.passage) for r in one.test}) == 5
    assert len({pair[0] in s.test for s in sides}) == 2


def old_split(rows: Sequence[Row], fraction: float, seed: int) -> ClientRows:
    """The split before passages were compared by keys."""
    passages = sorted({row.passage for row in rows}, key=lambda p: derive_seed(seed, "test split", p))
    held = set(passages[: round(fraction * len(passages))])
    return ClientRows(tuple(r for r in rows if r.passage not in held), tuple(r for r in rows if r.passage in held))


@given(st.lists(st.text("abcü \n\u0308", max_size=4), min_size=4, max_size=30), st.integers(0, 99))
def test_where_no_two_passages_read_alike_the_split_is_what_it_was(texts: list[str], seed: int) -> None:
    first = {passage_key(text): text for text in texts}
    rows = [Row(f"q{i}", "a", passage=first[passage_key(text)]) for i, text in enumerate(texts)]
    old = old_split(rows, 0.4, seed)
    if old.train and old.test:
        assert hold_out(rows, 0.4, seed, "bank") == old


def test_shipped_silos_have_no_two_passages_that_read_alike() -> None:
    for silo in SILOS:
        sides = generate_silo(silo, 0, 96, 40)
        texts = {
            str(r.get("passage") or r.get("context") or r["instruction"]) for side in sides.values() for r in side
        }
        assert len({passage_key(text) for text in texts}) == len(texts)


# Contexts that are no passages


def load(
    folder: Path, train: Sequence[str], test: Sequence[str] = (), said: list[str] | None = None, **data: Any
) -> ClientRows:
    """Read a client "bank" whose contexts these are; instructions differ."""
    files = {}
    for side, contexts in (("train", train), ("test", test)):
        if contexts:
            rows = [{"instruction": f"{side} {i}", "context": c, "response": "a"} for i, c in enumerate(contexts)]
            files[side] = str(folder / f"{side}.jsonl")
            (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate({"clients": {"bank": files}, **data})
    return load_clients(config, 0, say=[].append if said is None else said.append)["bank"]


@pytest.mark.parametrize("context", ["You are a helpful assistant.", "N/A", "患者", " -- "])
@pytest.mark.parametrize("test", [False, True])
def test_a_constant_context_is_said_to_be_one(tmp_path: Path, context: str, test: bool) -> None:
    said: list[str] = []
    rows = load(tmp_path, [context, f" {context.lower()}\r\n", *[context] * 8], [context] * 3 if test else (), said)
    assert (len(rows.train), len(rows.test)) == ((10, 3) if test else (8, 2))
    assert not {r.instruction for r in rows.train} & {r.instruction for r in rows.test}
    (line,) = said
    assert line.startswith("bank: the context is the same in all ")
    assert "train.jsonl, line 1, row 1" in line
    assert "column `passage`" in line
    assert context.strip() not in line
    assert {r.passage for r in rows.test} <= {context, f" {context.lower()}\r\n"}  # rows stay as they were read


def test_the_remedy_of_a_constant_context_helps() -> None:
    rows = [Row(f"q{i}", "a", "Be brief.", passage=f"letter {i // 2}") for i in range(20)]
    said: list[str] = []
    sides = hold_out(rows, 0.3, 0, "bank", say=said.append)
    assert not said
    assert len({r.passage for r in sides.test}) == 3
    assert not {r.passage for r in sides.train} & {r.passage for r in sides.test}


def test_the_same_question_on_both_sides_of_a_constant_context_is_refused(tmp_path: Path) -> None:
    rows = [Row("What now?", "a", "N/A", passage="N/A"), Row("q", "a", "N/A", passage="N/A")]
    with pytest.raises(DataError, match="1 passages are in train and in test"):
        check_disjoint(ClientRows(tuple(rows), (replace(rows[0], instruction="what  now?"),)), "bank")
    with pytest.raises(DataError, match="1 passages with test_fraction"):
        hold_out([rows[0]] * 5, 0.2, 0, "bank")


@pytest.mark.parametrize(
    "none", ["N/A", "n/a", "None", "-", "...", "<noinput>", "No context.", "NULL", "nan", "unknown"]
)
def test_a_context_that_stands_for_none_is_said_to(tmp_path: Path, none: str) -> None:
    said: list[str] = []
    rows = load(tmp_path, [none] * 12 + [f"note {i}" for i in range(8)], said=said)
    (line,) = said
    assert line.startswith("bank: the context of 12 of 20 rows (from ")
    assert 'means "no context"' in line
    assert len(rows.test) == 4  # of 20 things to tell apart, not of 9
    kept = load(tmp_path, [none, "note"], [none, "other"], said=said)
    assert len(kept.test) == 2


@pytest.mark.parametrize("text", ["none of the above applies", "no pain", "nothing", "n/a for Mr. Smith", "0"])
def test_a_text_is_not_taken_for_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="are in train and in test"):
        load(tmp_path, [text, "note"], [text, "other"])


def test_a_passage_of_most_rows_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    rows = load(tmp_path, ["Answer politely."] * 11 + [f"note {i}" for i in range(9)], said=said)
    assert len(rows.train) + len(rows.test) == 20
    (line,) = said
    assert line.startswith("bank: 11 of 20 rows (from ")
    assert "are in one split" in line
    said.clear()
    load(tmp_path, [f"note {i // 2}" for i in range(20)], said=said)
    assert not said


def test_validation_is_split_by_the_same_passages(tmp_path: Path) -> None:
    rows = load(tmp_path, ["N/A"] * 20, validation_fraction=0.25)
    assert [len(side) for side in (rows.train, rows.validation, rows.test)] == [12, 4, 4]
    with pytest.raises(DataError, match="1 passages with validation_fraction"):
        load(tmp_path, ["one letter"] * 9, ["another letter"] * 3, validation_fraction=0.25)


def test_rows_hashes_are_of_what_was_read() -> None:
    rows = ClientRows((Row("q", "a", NOTE, passage=NOTE),), ())
    other = ClientRows((Row("q", "a", NOTE, passage=SPELLINGS["CRLF"]),), ())
    assert rows_hash(rows) != rows_hash(other)


# Pooled data


def pool(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps({"response": "a", **row}) + "\n" for row in rows))
    return str(folder / name)


@pytest.mark.parametrize("by", ["iid", "natural"])
def test_a_pooled_test_file_is_compared_likewise(tmp_path: Path, by: str) -> None:
    wards = ["a", "b"]
    train = [{"instruction": f"q{i}", "context": f"Note {i}", "ward": wards[i % 2]} for i in range(40)]
    test = [{"instruction": f"t{i}", "context": f"test {i}", "ward": wards[i % 2]} for i in range(4)]
    settings = {"by": by, "min_rows": 1} | ({"column": "ward"} if by == "natural" else {"clients": 2})

    def read() -> dict[str, ClientRows]:
        files = {"source": pool(tmp_path, "train.jsonl", train), "test": pool(tmp_path, "test.jsonl", test)}
        return load_clients(DataConfig.model_validate({"partition": settings | files}), 0)

    assert len(read()) == 2
    test[3]["context"] = "note\u00a07 "
    pair = r"1 passages .*test\.jsonl, line 4, row 4 and .*train\.jsonl, line 8, row 8:"
    with pytest.raises(DataError, match=pair):
        read()


IDS = ["Zürich", unicodedata.normalize("NFD", "Zürich"), "Zürich ", "Zürich\u200b", "\u00a0Zürich"]


@pytest.mark.parametrize("other", IDS[1:])
def test_ids_that_read_the_same_are_one_client(tmp_path: Path, other: str) -> None:
    rows = [{"instruction": f"q{i}", "ward": ["Zürich", other, "Bern"][i % 3]} for i in range(60)]
    config = {"by": "natural", "column": "ward", "source": pool(tmp_path, "a.jsonl", rows)}
    clients = load_clients(DataConfig.model_validate({"partition": config}), 0)
    assert {n: len(c.train) + len(c.test) for n, c in clients.items()} == {"Bern": 20, "Zürich": 40}


@pytest.mark.parametrize("other", ["zürich", "ZÜRICH", "Zürіch"])
def test_ids_that_read_alike_but_are_not_the_same_are_refused(tmp_path: Path, other: str) -> None:
    rows = [{"instruction": f"q{i}", "ward": ["Zürich", other][i % 2]} for i in range(40)]
    config = {"by": "natural", "column": "ward", "source": pool(tmp_path, "a.jsonl", rows)}
    with pytest.raises(DataError, match=r"must not read alike|of one script"):
        load_clients(DataConfig.model_validate({"partition": config}), 0)


def test_an_id_that_is_written_otherwise_is_said(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "ward": ["A&E", "ward 7", "icu"][i % 3]} for i in range(60)]
    config = {"by": "natural", "column": "ward", "source": pool(tmp_path, "a.jsonl", rows)}
    said: list[str] = []
    load_clients(DataConfig.model_validate({"partition": config}), 0, say=said.append)
    (line,) = said
    assert line.endswith("2 of 3 names are changed to valid client names, such as 'A&E' to 'A-E'")


def test_thousands_of_clients_do_not_say_it_a_thousand_times(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "context": "N/A", "ward": f"w{i % 6}"} for i in range(120)]
    config = {"by": "natural", "column": "ward", "source": pool(tmp_path, "a.jsonl", rows)}
    said: list[str] = []
    load_clients(DataConfig.model_validate({"partition": config}), 0, say=said.append)
    assert len(said) == 4
    assert said[-1].endswith("3 more such lines, about other clients")


# Folders and keys


def client_folder(root: Path, name: str) -> None:
    (root / name).mkdir()
    pool(root / name, "train.jsonl", [{"instruction": f"{name!a} {i}"} for i in range(10)])


def test_a_folder_in_nfd_is_a_client_in_nfc(tmp_path: Path) -> None:
    for name in ("Zu\u0308rich", "Bern"):
        client_folder(tmp_path, name)
    assert list(load_clients(DataConfig(folder=str(tmp_path)), 0)) == ["Bern", "Zürich"]


@pytest.mark.parametrize(("one", "other"), [("Zu\u0308rich", "Zürich"), ("Bern", "bern"), ("coco", "сосо")])
def test_folders_and_keys_that_would_be_one_client_are_refused(tmp_path: Path, one: str, other: str) -> None:
    for name in (one, other):
        client_folder(tmp_path, name)
    keys = {name: {"train": str(tmp_path / name / "train.jsonl")} for name in (one, other)}
    for config in (DataConfig(folder=str(tmp_path)), DataConfig.model_validate({"clients": keys})):
        with pytest.raises(DataError, match="two clients of a run must not read alike"):
            load_clients(config, 0)
