"""From a recipe with [data.partition] to clients, their test rows and the manifest of who has what."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, load_clients, partition_manifest, rows_hash
from flexperts.data.rows import ClientRows
from flexperts.errors import ConfigError, DataError
from flexperts.recipe import parse_recipe

DOLLY = ["brainstorming", "classification", "information_extraction", "summarization"]
LABELS = [DOLLY[i % 4] for i in range(200)] + ["classification"] * 61


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def record(number: int, category: str, **more: Any) -> dict[str, Any]:
    return {"instruction": f"question {number}", "response": "answer", "category": category, **more}


POOL = [record(i, label, site=i % 3, ward=f"w{i // 4 % 2}") for i, label in enumerate(LABELS)]


def parse(folder: Path, data: str, more: str = "") -> RunConfig:
    text = f"seed = 5\n[data.partition]\nsource = 'pool.jsonl'\n{data}\n{more}"
    return parse_recipe(text, folder=folder)


def load(folder: Path, data: str, more: str = "") -> Clients:
    if not (folder / "pool.jsonl").exists():
        write(folder / "pool.jsonl", POOL)
    config = parse(folder, data, more)
    return load_clients(config.data, config.seed)


def questions(rows: ClientRows) -> list[str]:
    return [row.instruction for row in (*rows.train, *rows.test)]


@pytest.mark.parametrize(
    "data",
    [
        "by = 'pathological'\nclients = 4",
        "by = 'dirichlet'\nclients = 3\nalpha = 1",
        "by = 'natural'",
        "by = 'iid'\nclients = 3",
    ],
)
def test_a_recipe_divides_a_file(tmp_path: Path, data: str) -> None:
    clients = load(tmp_path, data)
    assert sorted(q for rows in clients.values() for q in questions(rows)) == sorted(r["instruction"] for r in POOL)
    assert list(clients) == sorted(clients)
    for rows in clients.values():
        assert len(rows.test) == round(0.2 * len(questions(rows)))
    assert clients == load(tmp_path, data)


def test_a_saved_recipe_divides_alike(tmp_path: Path) -> None:
    """It is written with all defaults, yet must not name settings that do not apply."""
    write(tmp_path / "pool.jsonl", POOL)
    for data in ("by = 'natural'", "by = 'iid'\nclients = 3", "by = 'pathological'\nclients = 4"):
        config = parse(tmp_path, data)
        again = parse_recipe(config.to_toml(), folder=tmp_path / "elsewhere")
        assert again == config
        assert load_clients(again.data, 5) == load_clients(config.data, 5)
    assert "alpha = 0.5" in parse(tmp_path, "by = 'dirichlet'\nclients = 3").to_toml().split("[data.partition]")[1]


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    pool = parse(tmp_path, "by = 'natural'\ntest = '../test.csv'").data.partition
    assert pool
    assert (pool.source, pool.test) == (str(tmp_path / "pool.jsonl"), str(tmp_path.parent / "test.csv"))
    hub = parse_recipe("[data.partition]\nsource = 'hub:o/n:s'\nby = 'natural'", folder=tmp_path).data.partition
    assert hub
    assert (hub.source, hub.test) == ("hub:o/n:s", None)


@pytest.mark.parametrize(("column", "names"), [("ward", ["w0", "w1"]), ("site", ["0", "1", "2"])])
def test_another_column_tells_clients_apart(tmp_path: Path, column: str, names: list[str]) -> None:
    clients = load(tmp_path, f"by = 'natural'\ncolumn = '{column}'")
    assert list(clients) == names
    for name, rows in clients.items():
        assert {str(POOL[int(q.split()[1])][column]) for q in questions(rows)} == {name}
        assert {row.category for row in rows.train} == set(DOLLY)  # the category stays what it was


def test_the_category_is_a_field_and_may_have_another_column(tmp_path: Path) -> None:
    clients = load(tmp_path, "by = 'natural'", "[data.columns]\ncategory = 'ward'")
    assert list(clients) == ["w0", "w1"]


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"pool.jsonl: no column 'wing' among .*'ward'.* data.partition.column must name one"
    ):
        load(tmp_path, "by = 'natural'\ncolumn = 'wing'")


@pytest.mark.parametrize("value", [1.5, True, ["a"]])
def test_labels_are_text_or_whole_numbers(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "pool.jsonl", [record(1, "a", ward=value)])
    with pytest.raises(DataError, match=r"row 1: ward is .*: it must be text or a (whole )?number"):
        load(tmp_path, "by = 'natural'\ncolumn = 'ward'")


@pytest.mark.parametrize(("column", "more"), [("category", {"category": " "}), ("ward", {"ward": None})])
def test_rows_without_a_label_are_refused(tmp_path: Path, column: str, more: dict[str, Any]) -> None:
    write(tmp_path / "pool.jsonl", [record(1, "a", ward="w"), {**record(2, "a"), **more}])
    with pytest.raises(
        DataError, match=f"row 2: {column} is empty: data.partition by = 'natural' needs it in every"
    ):
        load(tmp_path, f"by = 'natural'\ncolumn = '{column}'")


def test_iid_needs_no_category(tmp_path: Path) -> None:
    write(tmp_path / "pool.jsonl", [{"instruction": f"q{i}", "response": "a"} for i in range(20)])
    clients = load(tmp_path, "by = 'iid'\nclients = 2")
    assert [len(questions(rows)) for rows in clients.values()] == [10, 10]


# A shared test file


def scored(folder: Path, data: str, kinds: list[str]) -> dict[str, list[str]]:
    write(folder / "test.jsonl", [record(1000 + i, kind) for i, kind in enumerate(kinds)])
    clients = load(folder, f"test = 'test.jsonl'\n{data}")
    assert sum(len(rows.train) for rows in clients.values()) == len(POOL)
    return {name: [row.category for row in rows.test] for name, rows in clients.items()}


@pytest.mark.parametrize("data", ["by = 'natural'", "by = 'pathological'\nclients = 4"])
def test_test_rows_go_to_the_client_of_their_category(tmp_path: Path, data: str) -> None:
    got = scored(tmp_path, data, [*DOLLY, DOLLY[0]])
    assert got == {kind: [kind] * (1 + (kind == DOLLY[0])) for kind in DOLLY}


def test_clients_that_share_a_category_share_its_test_rows(tmp_path: Path) -> None:
    got = scored(tmp_path, "by = 'pathological'\nclients = 3\ncategories_per_client = 2", DOLLY)
    assert list(got.values()) == [DOLLY[0:2], DOLLY[1:3], DOLLY[2:4]]


@pytest.mark.parametrize("data", ["by = 'iid'\nclients = 3", "by = 'dirichlet'\nclients = 3"])
def test_mixed_clients_share_the_whole_test_file(tmp_path: Path, data: str) -> None:
    assert scored(tmp_path, data, ["new", DOLLY[0]]) == {f"client-0{i}": ["new", DOLLY[0]] for i in (1, 2, 3)}


def test_test_rows_of_no_client_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test.jsonl, line 5, row 5: its category occurs in no train row"):
        scored(tmp_path, "by = 'natural'", [*DOLLY, "new"])


def test_a_client_without_test_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no rows of client summarization, by category: each client needs at least"
    ):
        scored(tmp_path, "by = 'natural'", DOLLY[:3])


def test_training_on_a_test_passage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="passages are in train and in test"):
        load(tmp_path, "by = 'iid'\nclients = 2\ntest = 'pool.jsonl'")


# Settings


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("by = 'natural'\nclients = 3", "clients does not apply to by = 'natural'"),
        ("by = 'natural'\nalpha = 0.5", "alpha does not apply to by = 'natural'"),
        ("by = 'iid'\nclients = 3\ncolumn = 'category'", "column does not apply to by = 'iid'"),
        ("by = 'iid'\nclients = 3\nalpha = 1\ncategories_per_client = 1", "alpha, categories_per_client does not"),
        ("by = 'dirichlet'\nclients = 3\ncategories_per_client = 1", "categories_per_client does not apply"),
        ("by = 'pathological'\nclients = 3\nalpha = 0.5", "alpha does not apply to by = 'pathological'"),
        ("by = 'pathological'", "by = 'pathological' needs clients"),
        ("by = 'dirichlet'", "by = 'dirichlet' needs clients"),
        ("by = 'iid'", "by = 'iid' needs clients"),
        ("clients = 3", "data.partition.by: Field required"),
        ("by = 'random'\nclients = 3", "data.partition.by = 'random'"),
        ("by = 'iid'\nclients = 0", "data.partition.clients = 0"),
        ("by = 'dirichlet'\nclients = 3\nalpha = 0", "data.partition.alpha = 0"),
        ("by = 'iid'\nclients = 3\nmin_rows = 0", "data.partition.min_rows = 0"),
        ("by = 'iid'\nclient = 3", "did you mean 'data.partition.clients'?"),
        ("by = 'natural'\n[data.silos]", "at_silos (now: silos, partition)"),
    ],
)
def test_settings_are_checked(tmp_path: Path, data: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, data)
    assert said in str(caught.value)


# What a run keeps


def test_the_manifest_names_who_has_what(tmp_path: Path) -> None:
    clients = load(tmp_path, "by = 'dirichlet'\nclients = 3")
    manifest = partition_manifest(clients)
    assert set(manifest) == {"sha256", "clients"}
    for name, rows in clients.items():
        entry = manifest["clients"][name]
        assert (entry["train_rows"], entry["test_rows"]) == (len(rows.train), len(rows.test))
        assert entry["categories"] == Counter(row.category for row in rows.train)
        assert entry["train_sha256"] == rows_hash(ClientRows(rows.train, ()))
        assert entry["test_sha256"] == rows_hash(ClientRows((), rows.test))
    assert "question" not in json.dumps(manifest)


def test_the_manifests_hash_names_the_whole_division(tmp_path: Path) -> None:
    clients = load(tmp_path, "by = 'iid'\nclients = 3")
    one, two, three = clients.values()
    others: list[Clients] = [
        {"client-01": two, "client-02": one, "client-03": three},
        {"client-01": one, "client-02": two},
        {**clients, "client-03": ClientRows(three.train[1:], three.test)},
        {**clients, "client-03": ClientRows(three.train, three.test[1:])},
        {"client-01": one, "client-02": two, "client-04": three},
    ]
    assert len({partition_manifest(c)["sha256"] for c in [clients, *others]}) == 6
    assert partition_manifest(dict(reversed(clients.items()))) == partition_manifest(clients)
