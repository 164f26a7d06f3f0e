"""Validation rows: taken from the train rows by passage, unknown to training, no matter for the test rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexperts.config.data import DataConfig
from flexperts.data.clients import load_clients, partition_manifest, rows_hash
from flexperts.data.rows import ClientRows, Row
from flexperts.errors import ConfigError, DataError
from flexperts.recipe import parse_recipe


def passages(rows: tuple[Row, ...]) -> set[str]:
    return {row.passage for row in rows}


def shop(folder: Path, count: int = 30, *, test: bool = False) -> dict[str, object]:
    """Write rows about passages of three rows each, and return a data section for them."""
    folder.mkdir(exist_ok=True)
    for side in ("train", *(["test"] if test else [])):
        lines = [
            {"instruction": f"q{i}", "context": f"{side} note {i // 3}", "response": f"a{i}"} for i in range(count)
        ]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {side: str(folder / f"{side}.jsonl") for side in ("train", *(["test"] if test else []))}
    return {"clients": {"shop": files}}


@pytest.mark.parametrize("source", ["silos", "folder", "clients", "partition"])
def test_clients_that_are_left_out_change_nothing_of_the_others(tmp_path: Path, source: str) -> None:
    shop(tmp_path / "cafe")
    shop(tmp_path / "shop")
    data = {
        "silos": {"silos": {"train_rows": 24, "test_rows": 8}},
        "folder": {"folder": str(tmp_path)},
        "clients": {"clients": {n: {"train": str(tmp_path / n / "train.jsonl")} for n in ("cafe", "shop")}},
        "partition": {"partition": {"source": str(tmp_path / "shop" / "train.jsonl"), "by": "iid", "clients": 2}},
    }[source]
    whole = load_clients(DataConfig.model_validate(data), 0)
    gone, *left = whole
    assert load_clients(DataConfig.model_validate(data | {"leave_out": [gone]}), 0) == {n: whole[n] for n in left}
    with pytest.raises(DataError, match="no such client; did you mean"):
        load_clients(DataConfig.model_validate(data | {"leave_out": [f"{gone}x"]}), 0)
    with pytest.raises(DataError, match="leave at least one client"):
        load_clients(DataConfig.model_validate(data | {"leave_out": [*whole]}), 0)


def test_silos_of_a_deployed_run_are_not_left_out_by_name() -> None:
    with pytest.raises(ConfigError, match="do not connect the silos"):
        parse_recipe('[data]\nat_silos = true\nleave_out = ["shop"]')


def sections(folder: Path) -> dict[str, dict[str, object]]:
    """Data sections of every source."""
    pool = folder / "pool.jsonl"
    shop(folder).copy()
    pool.write_text((folder / "train.jsonl").read_text())
    return {
        "silos": {"silos": {"train_rows": 24, "test_rows": 8}},
        "one file": shop(folder),
        "partition": {"partition": {"source": str(pool), "by": "iid", "clients": 2}},
    }


@pytest.mark.parametrize("name", ["silos", "one file", "partition"])
@pytest.mark.parametrize("seed", [0, 1])
def test_validation_is_taken_from_train_by_passage(tmp_path: Path, name: str, seed: int) -> None:
    section = sections(tmp_path)[name]
    plain = load_clients(DataConfig.model_validate(section), seed)
    held = load_clients(DataConfig.model_validate(section | {"validation_fraction": 0.3}), seed)
    assert list(plain) == list(held)
    for client, rows in held.items():
        before = plain[client]
        assert rows.test == before.test
        assert before.validation == ()
        assert sorted((*rows.train, *rows.validation), key=str) == sorted(before.train, key=str)
        assert not passages(rows.validation) & (passages(rows.train) | passages(rows.test))
        assert len(passages(rows.validation)) == round(0.3 * len(passages(before.train)))
        # either side keeps the order of the file
        assert [row for row in before.train if row in rows.train] == list(rows.train)
        assert [row for row in before.train if row in rows.validation] == list(rows.validation)
        kept = partition_manifest(held)["clients"][client]
        assert (kept["train_rows"], kept["validation_rows"]) == (len(rows.train), len(rows.validation))
        assert kept["test_sha256"] == partition_manifest(plain)["clients"][client]["test_sha256"]


@pytest.mark.parametrize("name", ["silos", "one file", "partition"])
def test_a_number_of_rows_is_the_fewest_whole_passages_in_a_shares_order(tmp_path: Path, name: str) -> None:
    section, count = sections(tmp_path)[name], 3
    plain = load_clients(DataConfig.model_validate(section), 0)
    by_count = load_clients(DataConfig.model_validate(section | {"validation_rows": count}), 0)
    for client, rows in by_count.items():
        assert sorted((*rows.train, *rows.validation), key=str) == sorted(plain[client].train, key=str)
        assert not passages(rows.validation) & (passages(rows.train) | passages(rows.test))
        assert len(rows.validation) >= count
        fewer = passages(rows.validation)
        assert any(len([r for r in rows.validation if r.passage != p]) < count for p in fewer)
        share = len(fewer) / len(passages(plain[client].train))
        same = load_clients(DataConfig.model_validate(section | {"validation_fraction": share}), 0)
        assert same[client].validation == rows.validation


def test_the_choice_is_the_seeds_alone(tmp_path: Path) -> None:
    config = DataConfig.model_validate(shop(tmp_path, test=True) | {"validation_fraction": 0.3})
    first, again, other = (load_clients(config, seed)["shop"] for seed in (0, 0, 1))
    assert first == again
    assert passages(first.validation) != passages(other.validation)
    assert first.test == other.test


def test_the_choice_is_not_that_of_the_test_rows() -> None:
    """With one order of passages for both, a validation split would hold out what a test split would have."""
    from flexperts.data.holdout import hold_out

    rows = [Row(f"q{i}", "a", passage=f"note {i}") for i in range(40)]
    sides = [hold_out(rows, 0.25, 0, "shop", side).test for side in ("test", "validation")]
    assert len(sides[0]) == len(sides[1]) == 10
    assert sides[0] != sides[1]


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_side_without_a_passage_is_refused(tmp_path: Path, share: float) -> None:
    config = DataConfig.model_validate(shop(tmp_path, test=True) | {"validation_fraction": share})
    with pytest.raises(DataError, match=f"shop: 10 passages with validation_fraction = {share}"):
        load_clients(config, 0)


def test_rows_are_named_with_their_validation_rows() -> None:
    row, other = Row("q", "a", passage="p"), Row("q2", "a", passage="p2")
    plain = rows_hash(ClientRows((row,), (other,)))
    assert plain != rows_hash(ClientRows((row,), (other,), validation=(other,)))
    assert plain == rows_hash(ClientRows((row,), (other,), validation=()))


def test_scoring_validation_rows_needs_some() -> None:
    text = "[data.silos]\n[evaluation]\nsplit = 'validation'\n"
    with pytest.raises(ConfigError, match=r"needs data\.validation_fraction above 0"):
        parse_recipe(text)
    assert parse_recipe(text, ["data.validation_fraction=0.2"]).evaluation.split == "validation"
