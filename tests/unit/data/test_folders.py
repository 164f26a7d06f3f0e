"""A folder of clients: every sub-folder is one, or a line says why not."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from flexperts.config.data import DataConfig
from flexperts.data.clients import Clients, load_clients
from flexperts.data.silos.generate import write_silos
from flexperts.errors import DataError


def write(path: Path, count: int = 5, word: str = "t") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"{word}{i}", "response": "a"} for i in range(count)]
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    if path.name.lower().endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def load(folder: Path) -> tuple[Clients, list[str]]:
    notes: list[str] = []
    clients = load_clients(DataConfig(folder=str(folder)), 0, notes.append)
    return clients, [note.removeprefix(f"{folder}: ") for note in notes]


NAMES = ["train.jsonl", "train.json", "train.csv", "train.tsv", "train.parquet", "Train.JSONL", "TRAIN.csv.gz"]


@pytest.mark.parametrize("train", NAMES)
@pytest.mark.parametrize("test", [None, *(name.lower().replace("train", "test") for name in NAMES[:5]), "Test.Csv"])
def test_every_kind_of_file_makes_a_client(tmp_path: Path, train: str, test: str | None) -> None:
    write(tmp_path / "ward_a" / "train.jsonl")
    write(tmp_path / "ward_c" / train)
    if test:
        write(tmp_path / "ward_c" / test, 3, "test")
    clients, notes = load(tmp_path)
    assert {n: (len(c.train), len(c.test)) for n, c in clients.items()} == {
        "ward_a": (4, 1),
        "ward_c": (5, 3) if test else (4, 1),
    }
    assert notes == []


def test_what_is_no_client_is_told_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.jsonl")
    write(tmp_path / "b" / "train.csv")
    for name in "ab":
        write(tmp_path / name / "validation.jsonl")
    write(tmp_path / "a" / "more" / "train.jsonl")
    write(tmp_path / "deep" / "2024" / "train.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "pool.csv")
    write(tmp_path / "c" / "data.jsonl")
    write(tmp_path / "c" / "train-00001.parquet")
    clients, notes = load(tmp_path)
    assert list(clients) == ["a", "b"]
    assert sorted(notes) == [
        "a: not read: more, validation.jsonl",
        "b: not read: validation.jsonl",
        "c: not a client, as it has no file train.*; it contains: data.jsonl, train-00001.parquet",
        "deep: not a client, as it has no file train.*; it contains: 2024",
        "empty, nothing: not a client, as it has no file train.*; it contains: nothing",
        "not read, as it is not in a client's folder: pool.csv",
    ]


def test_the_same_in_many_folders_is_one_line(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"silo-{number:02}" / "train.jsonl")
        (tmp_path / f"silo-{number:02}" / "meta.yaml").write_text("")
    _, (note,) = load(tmp_path)
    assert note.startswith("silo-00, silo-01, ")
    assert note.endswith(", silo-09 and 20 more: not read: meta.yaml")


def test_hidden_entries_and_readmes_are_passed_over(tmp_path: Path) -> None:
    write_silos(tmp_path, 0, 8, 8)
    for hidden in (
        ".git/train.jsonl",
        ".cache/x",
        "clinic/.train.jsonl.swp",
        "clinic/.ipynb_checkpoints/train.jsonl",
    ):
        write(tmp_path / hidden)
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "clinic" / "README").write_text("")
    clients, notes = load(tmp_path)
    assert (list(clients), notes) == (["clinic", "help_desk", "law_firm", "shop"], [])


@pytest.mark.parametrize("side", ["train", "test"])
@pytest.mark.parametrize("other", ["csv", "jsonl.gz", "Parquet"])
def test_two_files_of_one_side_are_refused(tmp_path: Path, side: str, other: str) -> None:
    for name in ("train.jsonl", "test.jsonl", f"{side}.{other}"):
        write(tmp_path / "ward" / name)
    with pytest.raises(DataError, match=f"a client has one {side} file") as caught:
        load(tmp_path)
    assert f"{side}.{other}" in str(caught.value)
    assert str(tmp_path / "ward") in str(caught.value)


def test_a_test_file_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.jsonl")
    write(tmp_path / "b" / "test.csv")
    with pytest.raises(DataError, match=r"b: test.csv and no file train\.\*: a client needs rows to train on"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["train.xlsx", "train.txt", "train", "train.jsonl.zst"])
def test_a_train_file_of_an_unknown_kind(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a" / "train.jsonl")
    write(tmp_path / "b" / name)
    if name.startswith("train.jsonl"):
        assert load(tmp_path)[1] == [f"b: not a client, as it has no file train.*; it contains: {name}"]
        return
    with pytest.raises(DataError, match=r"data files end in \.csv"):
        load(tmp_path)
    write(tmp_path / "b" / "train.csv")
    assert load(tmp_path)[1] == [f"b: not read: {name}"]


def test_links_to_folders_and_files_go_by_their_own_names(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "7f3a" / "train.jsonl")
    blob = write(tmp_path / "elsewhere" / "a3f9c0e")
    (tmp_path / "silos" / "b").mkdir(parents=True)
    (tmp_path / "silos" / "a").symlink_to(tmp_path / "elsewhere" / "7f3a")
    (tmp_path / "silos" / "b" / "train.jsonl").symlink_to(blob)
    (tmp_path / "silos" / "broken").symlink_to(tmp_path / "gone")
    clients, notes = load(tmp_path / "silos")
    assert list(clients) == ["a", "b"]
    assert notes == ["not read, as it is not in a client's folder: broken"]


def test_a_folder_without_a_client_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "2024" / "train.jsonl")
    write(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"it must contain <client>/train\.jsonl files") as caught:
        load(tmp_path)
    assert "deep: not a client" in str(caught.value)
    assert "train.csv" in str(caught.value)
    with pytest.raises(DataError, match="it cannot be read"):
        load(tmp_path / "train.csv")
    with pytest.raises(DataError, match="there is no such folder"):
        load(tmp_path / "gone")
