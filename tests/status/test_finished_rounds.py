"""What is shown of ``rounds.jsonl``, while a process writes the file, cuts it, and writes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexperts.artifacts import RunDirectory
from flexperts.errors import ArtifactError
from flexperts.files import json_text, parsed_json, sealed
from flexperts.status import rounds
from flexperts.status.rounds import FinishedRounds
from flexperts.status.status import RunStatus

from .rounds_files import RECIPE, log


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "mine", RECIPE)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the rounds that are parsed, in order."""
    numbers: list[int] = []

    def parse(path: Path, line: bytes) -> Any:
        found = parsed_json(path, line)
        numbers.append(found["number"])
        return found

    monkeypatch.setattr(rounds, "parsed_json", parse)
    return numbers


def test_a_round_is_these_numbers(run: RunDirectory) -> None:
    """Means over silos by hand: 1.5 of losses 1 and 2; NLL 3 of 2 and 4; a score that is not finite leaves none."""
    scores = {
        "a": {"nll.global": 2.0, "rouge_l.global": 10.0, "nll.personalized": None, "rows": 7},
        "b": {"nll.global": 4.0, "nll.personalized": 1.0, "rows": 3},
    }
    privacy = {"epsilon": 2.5, "delta": 1e-5}
    more = {"missing": ["c"], "refused": {"d": "it is unknown"}, "participants": ["a", "b", "c"]}
    run.append_round(log(1, {"a": 1.0, "b": 2.0}, scores=scores, privacy=privacy, **more))
    finished = FinishedRounds(run.rounds_file)
    finished.look()
    assert finished.rounds == [
        {
            "number": 1,
            "planned": 3,
            "used": 2,
            "drawn": 3,
            "missing": 1,
            "refused": 1,
            "loss": 1.5,
            "losses": [1.0, 2.0],
            "scores": {"nll.global": 3.0, "rouge_l.global": 10.0, "nll.personalized": None},
            "seconds": {"training": 60.0, "evaluation": 4.0},
            "bytes": {"uplink": 2000, "downlink": 1000},
            "epsilon": 2.5,
        }
    ]
    never = {"used": 0, "last_used": None, "loss": None}
    assert finished.silos["c"] == never | {"drawn": 1, "missing": 1, "refused": 0, "late": True, "refusal": None}
    assert finished.silos["d"] == never | {
        "drawn": 0, "missing": 0, "refused": 1, "late": False, "refusal": "it is unknown"
    }  # fmt: skip


def test_a_loss_that_is_not_finite_leaves_no_mean_and_one_that_is_not_sent_is_not_counted(
    run: RunDirectory,
) -> None:
    run.append_round(log(1, {"a": float("nan"), "b": 2.0}))
    run.append_round(log(2, {"a": 1.0}) | {"clients": {"a": {"rows": 4}, "b": {"loss": 3.0, "rows": 4}}})
    run.append_round(log(3, {}))
    finished = FinishedRounds(run.rounds_file)
    finished.look()
    assert [one["loss"] for one in finished.rounds] == [None, 3.0, None]


def test_a_line_is_read_once_and_only_when_it_is_whole(run: RunDirectory, parsed: list[int]) -> None:
    finished = FinishedRounds(run.rounds_file)
    finished.look()
    assert (finished.rounds, finished.changed_at) == ([], None)
    run.append_round(log(1, {"a": 1.0}))
    finished.look()
    text = json_text(sealed(log(2, {"a": 0.5}))) + "\n"
    for part in (text[:200], text[200:-1], text[-1:]):
        assert len(finished.rounds) == 1
        with run.rounds_file.open("a") as lines:
            lines.write(part)
        finished.look()
        finished.look()
    assert [one["loss"] for one in finished.rounds] == [1.0, 0.5]
    assert parsed == [1, 2]
    assert finished.changed_at == run.rounds_file.stat().st_mtime


def test_a_run_that_resumes_behind_its_last_round_is_read_again(run: RunDirectory, parsed: list[int]) -> None:
    for number in (1, 2, 3):
        run.append_round(log(number, {"a": float(number)}, missing=["b"], participants=["a", "b"]))
    finished = FinishedRounds(run.rounds_file)
    finished.look()
    run.keep_rounds(2)
    run.append_round(log(3, {"a": 7.0, "b": 7.0}))
    finished.look()
    assert [one["loss"] for one in finished.rounds] == [1.0, 2.0, 7.0]
    assert (finished.silos["b"]["missing"], finished.silos["b"]["used"]) == (2, 1)
    run.keep_rounds(3)  # a resumed run rewrites the file, also where nothing is cut
    run.append_round(log(4, {"a": 0.0}))
    finished.look()
    assert parsed == [1, 2, 3, 1, 2, 3, 4]


STEPS = st.lists(st.sampled_from(["round", "half", "resume", "cut", "look"]), max_size=14)


@settings(max_examples=60)
@given(steps=STEPS)
def test_looking_often_finds_what_looking_once_finds(
    steps: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    often, loss = FinishedRounds(run.rounds_file), 0.0
    for step in steps:
        count = run.written_rounds()
        if step == "half":
            with run.rounds_file.open("a") as lines:
                lines.write('{"sha256": "ab')
        elif step == "look":
            often.look()
        else:
            if run.has_rounds():  # as every resume does
                run.keep_rounds(max(0, count - (step == "cut")))
            if step == "round":
                loss = 10 * loss + 1  # longer every time: a clock's tick is long beside these steps
                run.append_round(log(run.written_rounds() + 1, {"a": loss}))
    once = FinishedRounds(run.rounds_file)
    once.look()
    often.look()
    assert (often.rounds, often.silos) == (once.rounds, once.silos)


@pytest.mark.parametrize("fault", [lambda line: line.replace("1.0", "9.0"), lambda line: line[:50] + "\n"])
def test_a_damaged_line_is_refused_and_a_restored_one_read(run: RunDirectory, fault: Any) -> None:
    run.append_round(log(1, {"a": 1.0}))
    whole = run.rounds_file.read_text()
    run.rounds_file.write_text(fault(whole))
    finished = FinishedRounds(run.rounds_file)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"rounds\.jsonl: it is damaged"):
            finished.look()
    run.rounds_file.write_text(whole)
    finished.look()
    assert len(finished.rounds) == 1


def test_a_round_that_is_left_out_is_refused(run: RunDirectory) -> None:
    run.append_round(log(1, {"a": 1.0}))
    run.append_round(log(3, {"a": 1.0}))
    with pytest.raises(ArtifactError, match="round 3 follows round 1"):
        FinishedRounds(run.rounds_file).look()


def test_a_page_gets_a_bounded_value(run: RunDirectory) -> None:
    """Of 1,201 rounds every third, with the last; of 150 silos those with trouble, then the first by name."""
    names = [f"silo-{number:03}" for number in range(150)]
    late = {"participants": ["silo-140", "silo-149", *names[:3]], "missing": ["silo-149"]}
    run.append_round(log(1, dict.fromkeys(names, 1.0)))
    run.append_round(log(2, {"silo-000": 1.0}, **late | {"missing": ["silo-140", "silo-149"]}))
    run.append_round(log(3, {"silo-140": 1.0}, **late))
    status = RunStatus(run)
    [found] = status.look_for_page()["status"]["runs"]
    assert [silo["name"] for silo in found["silos"][:3]] == ["silo-149", "silo-140", "silo-000"]
    assert (len(found["silos"]), found["more_silos"]) == (100, 50)
    for number in range(4, 1202):
        run.append_round(log(number, {"a": float(number)}))
    [found] = status.look_for_page()["status"]["runs"]
    assert [point["number"] for point in found["points"]] == [*range(1, 1202, 3)]
    assert (found["every"], found["rounds"]["done"], len(found["points"])) == (3, 1201, 401)
    assert len(json_text(found)) < 200_000
    assert len(status.look()["silos"]) == 151


def test_a_page_also_gets_the_reference_methods_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "mine", RECIPE + '[method]\nname = "flex"\nreference = "fedavg"\n')
    run.append_round(log(1, {"a": 1.0}))
    status = RunStatus(run)
    assert [one["method"] for one in status.look_for_page()["status"]["runs"]] == ["flex"]
    other = RunDirectory.create(run.reference, RECIPE + '[method]\nname = "fedavg"\n')
    assert [one["rounds"]["done"] for one in status.look_for_page()["status"]["runs"]] == [1, 0]
    other.append_round(log(1, {"a": 1.0}))
    found = status.look_for_page()["status"]
    assert [(one["method"], one["rounds"]["done"]) for one in found["runs"]] == [("flex", 1), ("fedavg", 1)]
    assert found["last_round_at"] == other.rounds_file.stat().st_mtime


def test_names_that_cannot_be_printed_are_escaped(run: RunDirectory) -> None:
    """No silo can have such a name; a file can hold anything."""
    strange = {"a\u202eb": 1.0, "\ud800": 1.0, "<b>": 1.0}
    run.append_round(log(1, strange))
    found = json.loads(json_text(RunStatus(run).look_for_page()))
    assert [silo["name"] for silo in found["status"]["runs"][0]["silos"]] == ["<b>", "a\\u202eb", "\\ud800"]
