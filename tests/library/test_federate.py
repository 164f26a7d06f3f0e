"""A run by one call: the same as the run of a recipe, with rows that stay in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

import flexperts
from flexperts import Callback, FlexpertsError, Run, federate, load_recipe, run_federation
from flexperts.errors import ArtifactError, ConfigError, DataError
from flexperts.observer import TurnState

WORDS = {"a": "ox", "b": "ant", "c": "bee"}
SMALL: dict[str, Any] = {
    "training": {"max_length": 128, "lr": 0.05},
    "evaluation": {"max_new_tokens": 4},
    "progress": False,
}


def rows(word: str, count: int = 8) -> list[dict[str, str]]:
    return [{"instruction": f"Name item {i}.", "response": f"{word} {i}"} for i in range(count)]


def given() -> dict[str, Any]:
    """Three clients' rows, as three kinds of objects."""
    kinds: tuple[Callable[..., Any], ...] = (pandas.DataFrame, datasets.Dataset.from_list, list)
    return {name: kind(rows(word)) for (name, word), kind in zip(WORDS.items(), kinds, strict=True)}


def tiny(base: Path) -> dict[str, str]:
    return {"base": str(base), "dtype": "float32", "precision": "fp32"}


class Heard(Callback):
    """Notes what it hears; it has no call of super().__init__, as callbacks of transformers."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.rounds: list[dict[str, Any]] = []
        self.turns: list[tuple[str, TurnState | None]] = []

    def on_round_end(self, *, record: Any, **later: Any) -> None:
        self.rounds.append(record)
        if record["number"] == self.stop:
            raise KeyboardInterrupt

    def on_client_end(self, *, client: str, state: TurnState | None, **later: Any) -> None:
        self.turns.append((client, state))


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Heard]:
    heard, out = Heard(), tmp_path_factory.mktemp("runs") / "whole"
    return federate(tiny(tiny_base), given(), rounds=2, out=out, callbacks=[heard], **SMALL), heard


def states(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "personal").glob("*.safetensors"))}


def test_it_is_the_run_of_the_same_rows_in_files(whole: tuple[Run, Heard], tiny_base: Path, tmp_path: Path) -> None:
    files: dict[str, Any] = {}
    for name, word in WORDS.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows(word)))
    again = federate(tiny(tiny_base), files, rounds=2, out=str(tmp_path / "run"), **SMALL)
    assert again.scores == whole[0].scores
    assert again.directory.partition.read_bytes() == whole[0].directory.partition.read_bytes()
    assert states(again.path) == states(whole[0].path)


def test_worker_processes_take_rows_from_memory(whole: tuple[Run, Heard], tiny_base: Path, tmp_path: Path) -> None:
    engine = {"workers": 2, "threads": 1}
    run = federate(tiny(tiny_base), given(), rounds=2, out=tmp_path / "run", engine=engine, **SMALL)
    assert run.summary["engine"]["workers"] == 2
    assert run.scores == whole[0].scores
    assert states(run.path) == states(whole[0].path)


def test_the_run_directory_has_texts_of_scored_rows_only(whole: tuple[Run, Heard]) -> None:
    run = whole[0]
    texts = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    holding = {path.relative_to(run.path).parts[0] for path, text in texts.items() if b"Name item" in text}
    assert holding == {"predictions"}
    assert not (run.path / "rows").exists()
    assert 'train = "python:a/train"' in run.directory.config_toml


def test_callbacks_hear_rounds_and_clients(whole: tuple[Run, Heard]) -> None:
    heard = whole[1]
    assert [record["number"] for record in heard.rounds] == [1, 2]
    assert all(record["clients"][name]["loss"] > 0 for record in heard.rounds for name in WORDS)
    trained = [(client, s.loss) for client, s in heard.turns if s is not None and s.phase == "training"]
    assert [client for client, _ in trained] == [*WORDS, *WORDS]
    assert all(loss is not None for _, loss in trained)
    assert {s.phase for _, s in heard.turns if s is not None} >= {"training", "evaluation"}


def test_a_resumed_run_asks_for_the_same_rows(whole: tuple[Run, Heard], tiny_base: Path, tmp_path: Path) -> None:
    call: dict[str, Any] = {"model": tiny(tiny_base), "rounds": 2, "out": tmp_path / "run", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        federate(clients=given(), callbacks=[Heard(stop=1)], **call)
    with pytest.raises(ArtifactError, match="resume=True"):
        federate(clients=given(), **call)
    with pytest.raises(DataError, match="b: train 6 rows as before, but not the same ones"):
        federate(clients={**given(), "b": rows("wasp")}, resume=True, **call)
    with pytest.raises(DataError, match="given from Python"):
        run_federation(load_recipe(tmp_path / "run" / "config.toml"), tmp_path / "run", resume=True)
    heard = Heard()
    run = federate(clients=given(), resume=True, callbacks=[heard], **call)
    assert [record["number"] for record in heard.rounds] == [2]
    assert run.scores == whole[0].scores
    assert states(run.path) == states(whole[0].path)


def test_kept_rows_resume_and_evaluate_without_the_program(
    whole: tuple[Run, Heard], tiny_base: Path, tmp_path: Path
) -> None:
    call: dict[str, Any] = {"model": tiny(tiny_base), "rounds": 2, "out": tmp_path / "run", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        federate(clients=given(), callbacks=[Heard(stop=1)], keep_rows=True, **call)
    assert sorted(p.name for p in (tmp_path / "run" / "rows").iterdir()) == [*WORDS]
    (moved := tmp_path / "moved").parent.joinpath("run").rename(moved)
    run_federation(load_recipe(moved / "config.toml"), moved, resume=True)
    assert states(moved) == states(whole[0].path)
    with Run(moved) as run:
        assert run.evaluate() == run.scores == whole[0].scores


def test_a_run_scores_its_own_rows_again_and_others(whole: tuple[Run, Heard]) -> None:
    run, _ = whole
    assert run.evaluate() == run.scores
    other = run.evaluate({"a": pandas.DataFrame(rows("ox", 2))})
    assert [*other["nll"]] == ["a"]
    assert other["nll"]["a"].keys() == {"zero_shot", "global", "personalized"}
    with pytest.raises(DataError, match="given from Python"):
        Run(run.path).evaluate()


def test_a_client_with_rows_in_memory_joins(whole: tuple[Run, Heard], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whole[0].path, tmp_path / "run")
    with pytest.raises(ConfigError, match="rows in memory have no file name"):
        flexperts.join(tmp_path / "run", rows("cow"))
    record = flexperts.join(tmp_path / "run", pandas.DataFrame(rows("cow")), name="d", steps=1)
    assert record["data"]["train"] == "python:d/train"
    run = Run(tmp_path / "run")
    assert run.clients == [*WORDS, "d"]
    assert run.model("d").generate(["Name item 1."], max_new_tokens=1)
    assert b"cow" not in b"".join(p.read_bytes() for p in (tmp_path / "run" / "joined").iterdir())


def test_test_rows_can_be_given(tiny_base: Path, tmp_path: Path) -> None:
    split = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows("ox")), test=datasets.Dataset.from_list(rows("ox", 10)[8:])
    )
    out = tmp_path / "run"
    run = federate(tiny(tiny_base), {"a": split, "b": rows("ant")}, {"name": "local"}, 1, out=out, **SMALL)
    entries = json.loads(run.directory.partition.read_text())["clients"]
    assert [(its["train_rows"], its["test_rows"]) for its in entries.values()] == [(8, 2), (6, 2)]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training": {"learning_rate": 1.0}}, "unknown key 'training.learning_rate'"),
    ({"trainings": {}}, "unknown key 'trainings'.*'training'"),
    ({"training": {"lr": "fast"}}, "training.lr = 'fast'"),
    ({"training": 3}, "training"),
    ({"rounds": 0}, "federation.rounds = 0"),
    ({"rounds": 2, "federation": {"rounds": 3}}, "they are one setting"),
    ({"federation": 3}, "federation = 3"),
    ({"clients": {}}, "a mapping from each name to its rows"),
    ({"clients": {"a": {"instruction": ["x"]}}}, "a client has train rows"),
    ({"clients": {"a": {"train": [], "validation": []}}}, "unknown key 'data.clients.a.validation'"),
    ({"clients": {"a/b": rows("ox")}}, "a client's name is letters"),
    ({"clients": {"a": 7}}, "python:a/train: builtins.int"),
    ({"clients": "nowhere"}, "there is no such folder"),
    ({"clients": {"a": Path("nowhere.csv")}}, "there is no such data file"),
    ({"data": {"clients": {}, "columns": {"x": "y"}}}, "columns maps"),
    ({"method": "felx"}, "'flex'"),
    ({"method": 3}, "method: int"),
    ({"model": 3}, "model: int"),
    ({"callbacks": [print]}, "callbacks are objects"),
    ({"resume": True, "out": None}, "it needs the directory"),
]


@pytest.mark.parametrize(("changed", "told"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_errors_of_this_package(
    changed: dict[str, Any], told: str, tiny_base: Path, tmp_path: Path
) -> None:
    call = {"model": tiny(tiny_base), "clients": given(), "out": tmp_path / "run", "progress": False}
    with pytest.raises(FlexpertsError, match=told):
        federate(**(call | changed))
    assert not (tmp_path / "run").exists()


def test_progress_and_the_table_of_scores_are_shown(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SMALL, "progress": True}
    federate(tiny(tiny_base), {"a": rows("ox"), "b": rows("ant")}, rounds=1, out=tmp_path / "run", **settings)
    printed = capsys.readouterr().out
    assert "flex personalized" in printed
    assert "0 personal bytes sent" in printed


def test_without_progress_nothing_is_printed(whole: tuple[Run, Heard], capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"rounds": 2, "out": whole[0].path, "resume": True, **SMALL}
    base = Path(whole[0].summary["base"]["name"])
    assert federate(tiny(base), given(), **settings).scores == whole[0].scores  # it has finished
    assert capsys.readouterr() == ("", "")
