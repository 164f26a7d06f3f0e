"""The longest answer: chosen by the train rows, recorded, and said where it cuts references or answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.client.answer_limit import answer_limit, check_limit, chosen_limit
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.finished.joining import join
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer
from flexperts.recipe import parse_recipe

Recipe = Callable[..., RunConfig]
# Byte tokens: a response of n letters has n tokens and its end.
LETTERS = {"bank": (3, 20), "cafe": (9, 70)}
"""Client -> letters of its train and of its test responses."""


class Notices(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)

    def stage(self, text: str) -> None:
        self.stages.append(text)


def write(folder: Path, client: str, train: int, test: int) -> None:
    (folder / client).mkdir(parents=True)
    for side, letters, count in (("train", train, 6), ("test", test, 3)):
        rows = [{"instruction": f"{side} {i}", "response": chr(97 + i) * (letters - i)} for i in range(count)]
        rows = [row for row in rows if row["response"]]
        (folder / client / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    for name, (train, test) in LETTERS.items():
        write(folder, name, train, test)
    return folder


@pytest.fixture(scope="module")
def make(byte_base: Path, clients: Path) -> Recipe:
    text = f"""
        [model]
        base = "{byte_base}"
        dtype = "float32"
        precision = "fp32"
        [data]
        folder = "{clients}"
        [training]
        max_length = 256
        local_steps = 1
        [federation]
        rounds = 1
    """
    return lambda *overrides: parse_recipe(text, overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make: Recipe) -> tuple[Path, dict[str, Any], Notices]:
    out, told = tmp_path_factory.mktemp("finished") / "run", Notices()
    return out, run_federation(make(), out, told), told


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_smallest_power_of_two_that_holds_a_response(longest: int, most: int) -> None:
    limit = chosen_limit(longest, most)
    assert limit == most or (limit & (limit - 1) == 0 and limit >= longest and limit < 2 * longest)


@pytest.mark.parametrize(("longest", "limit"), [(1, 1), (2, 2), (3, 4), (32, 32), (33, 64), (118, 128), (300, 512)])
def test_by_hand(longest: int, limit: int) -> None:
    assert chosen_limit(longest, 512) == limit
    assert chosen_limit(longest, 100) == min(limit, 100)


@pytest.mark.parametrize(("settings", "limit"), [((), 16), (("evaluation.max_new_tokens=5",), 5)])
def test_the_recipes_own_stands_before_the_longest_train_response(
    make: Recipe, settings: tuple[str, ...], limit: int
) -> None:
    config = make(*settings)
    assert answer_limit(Workspace(config), config) == limit  # cafe's 9 letters and their end


def test_longer_references_are_said_before_round_1(finished: tuple[Path, dict[str, Any], Notices]) -> None:
    told = finished[2]
    [note] = [text for text in told.said if "max_new_tokens" in text]
    assert note.startswith("with evaluation.max_new_tokens = 16, answers are shorter than these references: ")
    assert "bank 3 of 3 (up to 20 tokens), cafe 3 of 3 (up to 70 tokens)" in note
    chosen = next(i for i, text in enumerate(told.stages) if "answers of up to 16 tokens" in text)
    assert chosen < told.stages.index("round 1 of 1")


def test_the_summary_counts_longer_references_and_cut_answers(
    finished: tuple[Path, dict[str, Any], Notices],
) -> None:
    out, summary, _ = finished
    for name, client in summary["clients"].items():
        assert client["answers"]["max_new_tokens"] == 16
        assert client["answers"]["longer_references"] == 3
        lines = [json.loads(line) for line in (out / "predictions" / f"{name}.jsonl").read_text().splitlines()]
        assert set(client["answers"]["cut"]) == {"zero_shot", "global", "personalized"}
        assert 0 <= client["answers"]["cut"]["global"] <= len(lines)
    run = TrainedRun(out)
    scores = run.evaluate()
    counted = {name: {state: its.cut for state, its in states.items()} for name, states in scores.items()}
    assert counted == {name: client["answers"]["cut"] for name, client in summary["clients"].items()}
    assert sum(sum(states.values()) for states in counted.values()) > 0
    for states in scores.values():
        for its in states.values():
            assert all(len(answer) <= answer.tokens <= 16 for answer in its.predictions)
            assert all(answer.tokens == 16 for answer in its.predictions if answer.cut)
    run.close()


@pytest.mark.parametrize("letters", [(4, 4), (4, 16), (12, 8)])
def test_nothing_is_said_where_every_reference_fits(make: Recipe, tmp_path: Path, letters: tuple[int, int]) -> None:
    write(tmp_path / "rows", "only", *letters)
    told = Notices()
    limit = f"evaluation.max_new_tokens={max(letters)}"
    config = make(f"data.folder={tmp_path / 'rows'}", "method.name=zero_shot", limit)
    summary = run_federation(config, tmp_path / "run", told)
    assert told.said == []
    assert summary["clients"]["only"]["answers"]["longer_references"] == 0


def test_the_recorded_limit_holds_when_rows_are_others(
    finished: tuple[Path, dict[str, Any], Notices], make: Recipe, tmp_path: Path
) -> None:
    """A newcomer whose rows would choose 64 is scored like those that took part."""
    out, _, _ = finished
    run = TrainedRun(out)
    assert run.config.evaluation.max_new_tokens == 16
    run.close()
    write(tmp_path, "late", 40, 50)
    record = join(out, tmp_path / "late" / "train.jsonl", test=tmp_path / "late" / "test.jsonl", steps=1)
    assert record["answers"]["max_new_tokens"] == 16
    assert record["answers"]["longer_references"] == 3
    run = TrainedRun(out)
    assert run.evaluate()["late"]["personalized"].cut == record["answers"]["cut"]["personalized"]
    run.close()


def test_a_resumed_run_has_the_same_limit(make: Recipe, tmp_path: Path) -> None:
    whole = run_federation(make(), tmp_path / "whole")

    class Stop(Exception):  # noqa: N818
        pass

    class AfterTheFirst(Observer):
        def round(self, record: Any) -> None:
            raise Stop

    settings = ("federation.rounds=2",)
    with pytest.raises(Stop):
        run_federation(make(*settings), tmp_path / "run", AfterTheFirst())
    resumed = run_federation(make(*settings), tmp_path / "run", resume=True)
    for name, client in resumed["clients"].items():
        assert client["answers"]["max_new_tokens"] == whole["clients"][name]["answers"]["max_new_tokens"] == 16


def test_an_answer_tells_whether_it_was_cut(finished: tuple[Path, dict[str, Any], Notices]) -> None:
    run = TrainedRun(finished[0])
    usual = run.generate("bank", "Hello", state="zero_shot")
    assert usual.tokens <= 16
    long = run.generate("bank", "Hello", state="zero_shot", max_new_tokens=200)
    short = run.generate("bank", "Hello", state="zero_shot", max_new_tokens=3)
    assert (short.tokens, short.cut) == (3, True)
    assert long.startswith(short.rstrip("\ufffd"))
    assert long.cut == (long.tokens == 200)
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        run.generate("bank", "Hello", max_new_tokens=0)
    run.close()


@pytest.mark.parametrize(("letters", "asked", "limit"), [(600, 300, 1024 - 300), (600, 100, 924), (100, 300, 128)])
def test_a_chosen_limit_leaves_room_for_the_longest_prompt(
    make: Recipe, tmp_path: Path, letters: int, asked: int, limit: int
) -> None:
    """The base reads 1,024 tokens: a limit that nobody asked for must not be what refuses a run."""
    train = {"instruction": "Q", "response": "a" * letters}
    prompt = len(Workspace(make()).encoder.prompt(""))
    test = {"instruction": "q" * (asked - prompt), "response": "b"}
    for side, row in (("train", train), ("test", test)):
        (tmp_path / "ward").mkdir(exist_ok=True)
        (tmp_path / "ward" / f"{side}.jsonl").write_text(json.dumps(row) + "\n")
    config = make(f"data.folder={tmp_path}", "training.max_length=1024")
    workspace = Workspace(config)
    assert answer_limit(workspace, config) == limit
    check_limit(workspace, config, Observer())
    given = make(f"data.folder={tmp_path}", "training.max_length=1024", "evaluation.max_new_tokens=1000")
    with pytest.raises(ConfigError, match=f"a prompt of {asked} tokens, and an answer of up to 1000"):
        check_limit(workspace, given, Observer())
