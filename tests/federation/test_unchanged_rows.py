"""A run's rows stay those that it started with: others are refused wherever rows are read again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.data import DataConfig
from flexperts.config.run import RunConfig
from flexperts.data.clients import load_clients, partition_manifest, rows_hash
from flexperts.data.rows import ClientRows, Row
from flexperts.data.unchanged import check_unchanged
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, DataError
from flexperts.finished.joining import join
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer

SHORT = ("evaluation.max_new_tokens=2", "evaluation.rows=2", "training.local_steps=1")


class BrokenOffError(Exception):
    pass


class AfterRound1(Observer):
    def round(self, record: Any) -> None:
        raise BrokenOffError


@pytest.fixture
def data(silos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(silos, tmp_path / "data"))


@pytest.fixture
def config(recipe: Callable[..., RunConfig], data: Path) -> RunConfig:
    """All silos' files; those of `clinic` are one file, whose passages are split by hash."""
    (data / "clinic" / "test.jsonl").unlink()
    found = {p.name: {s: str(p / f"{s}.jsonl") for s in ("train", "test")} for p in data.iterdir() if p.is_dir()}
    del found["clinic"]["test"]
    rows = DataConfig(clients=found, validation_fraction=0.2)
    return recipe(*SHORT).model_copy(update={"data": rows})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_answer(data: Path) -> None:
    rows = lines(data / "shop" / "train.jsonl")
    rows[3]["response"] += " indeed"
    write(data / "shop" / "train.jsonl", rows)


def three_rows_more(data: Path) -> None:
    rows = lines(data / "shop" / "train.jsonl")
    write(data / "shop" / "train.jsonl", [*rows, *({**r, "instruction": r["instruction"] + "!"} for r in rows[:3])])


def one_passage_more(data: Path) -> None:
    rows = lines(data / "clinic" / "train.jsonl")
    write(data / "clinic" / "train.jsonl", [*rows, {**rows[0], "context": "Quite new.", "passage": "new"}])


def a_test_row_less(data: Path) -> None:
    write(data / "law_firm" / "test.jsonl", lines(data / "law_firm" / "test.jsonl")[:-1])


def another_order(data: Path) -> None:
    write(data / "help_desk" / "train.jsonl", lines(data / "help_desk" / "train.jsonl")[::-1])


CHANGES = [
    (one_answer, ["shop: ", "rows as before, but not the same ones"]),
    (three_rows_more, ["shop: train ", " rows before, ", " now"]),
    (one_passage_more, ["clinic: "]),
    (a_test_row_less, ["law_firm: test 4 rows before, 3 now"]),
    (another_order, ["help_desk: ", "rows as before, but not the same ones"]),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_resumed_run_takes_no_other_rows(
    config: RunConfig, data: Path, tmp_path: Path, change: Callable[[Path], None], said: list[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(BrokenOffError):
        run_federation(config, out, AfterRound1())
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    change(data)
    with pytest.raises(DataError) as refused:
        run_federation(config, out, resume=True)
    assert all(text in refused.value.value for text in said), refused.value.value
    assert str(out) in refused.value.rule
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_evaluation_takes_no_other_rows_and_use_needs_none(config: RunConfig, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_federation(config, out)
    shutil.copytree(data / "shop", tmp_path / "late")
    join(out, tmp_path / "late" / "train.jsonl", test=tmp_path / "late" / "test.jsonl", name="late", steps=1)
    one_passage_more(data)
    run = TrainedRun(out)
    assert isinstance(run.generate("clinic", "Say hi."), str)
    with pytest.raises(DataError, match=r"clinic: .*started with other rows.*--data"):
        run.evaluate()
    run.close()
    shutil.copy(tmp_path / "late" / "test.jsonl", data / "clinic" / "train.jsonl")  # the participants' as well
    write(tmp_path / "late" / "test.jsonl", lines(tmp_path / "late" / "test.jsonl")[:2])
    run = TrainedRun(out)
    with pytest.raises(DataError, match=r"late: test 4 rows before, 2 now: late joined with other rows"):
        _ = run.client("late").scored_rows
    assert isinstance(run.generate("late", "Say hi."), str)
    run.close()


@pytest.mark.parametrize("damage", ["{}", '{"sha256": "0", "clients": {}}', '{"clients": []}', "[1]", "no JSON"])
def test_a_damaged_record_is_not_taken_for_one(config: RunConfig, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(BrokenOffError):
        run_federation(config, out, AfterRound1())
    (out / "partition.json").write_text(damage)
    with pytest.raises(ArtifactError, match=r"partition\.json: it is damaged"):
        run_federation(config, out, resume=True)
    (out / "partition.json").unlink()
    with pytest.raises(ArtifactError, match=r"partition\.json"):
        run_federation(config, out, resume=True)


def row(text: str, where: str = "") -> Row:
    return Row(text, text, passage=text, where=where)


def manifest(**clients: ClientRows) -> dict[str, Any]:
    return dict(partition_manifest(clients)["clients"])


A, B, C = row("a"), row("b"), row("c")


X, X_AND_VALIDATION = ClientRows((A,), (B,)), ClientRows((A,), (B,), (C,))


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"x": X}, {"x": X, "y": X}, "y is new"),
        ({"x": X, "y": X}, {"x": X}, "y is missing"),
        ({"x": ClientRows((A, C), (B,))}, {"x": ClientRows((C, A), (B,))}, "x: train 2 rows as before, but not"),
        ({"x": X_AND_VALIDATION}, {"x": ClientRows((A,), (B,), (B,))}, "x: validation 1 rows as before"),
        ({"x": X_AND_VALIDATION}, {"x": ClientRows((A, C), (B,))}, "train 1 rows before, 2 now, validation 1"),
    ],
)
def test_every_change_is_named(before: Any, now: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        check_unchanged(manifest(**before), now, "rule")
    assert said in refused.value.value


def test_where_a_row_stands_is_no_part_of_it() -> None:
    moved = {"x": ClientRows((row("a", "old.csv, row 1"),), (row("b", "old.csv, row 2"),))}
    check_unchanged(manifest(**moved), {"x": ClientRows((A,), (B,))}, "rule")


def test_records_of_earlier_versions_have_no_hash_of_validation_rows() -> None:
    entry = manifest(x=ClientRows((A,), (B,), (C,)))
    del entry["x"]["validation_sha256"]
    check_unchanged(entry, {"x": ClientRows((A,), (B,), (C,))}, "rule")
    with pytest.raises(DataError):
        check_unchanged(entry, {"x": ClientRows((A,), (C,), (C,))}, "rule")


def test_the_hash_in_the_record_is_that_of_one_side(config: RunConfig) -> None:
    clients = load_clients(config.data, config.seed)
    entries = partition_manifest(clients)["clients"]
    for name, rows in clients.items():
        assert entries[name]["test_sha256"] == rows_hash(ClientRows((), rows.test))
        assert entries[name]["validation_sha256"] == rows_hash(ClientRows((), rows.validation))
