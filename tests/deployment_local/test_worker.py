"""The worker's answers are those of the in-process client, from one base, and failures tell nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from flexperts.client.answer import answer
from flexperts.client.client import Resident
from flexperts.client.workspace import Workspace
from flexperts.communication.messages import info_of, records
from flexperts.communication.traffic import encoded_objects
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.deployment import worker as worker_module
from flexperts.deployment.kept import keep_recipe, kept_runs
from flexperts.deployment.ledger import Ledger
from flexperts.deployment.settings import for_silo
from flexperts.deployment.state import make_private
from flexperts.deployment.worker import Worker
from flexperts.errors import ArtifactError
from flexperts.observer import Observer
from flexperts.parameters.store import load_personal

from .asking import BAD_RUNS, RUN, Ask, converse

Handed = Callable[..., RunConfig]
OTHER = "f" * 32


class Lines(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, text: str) -> None:
        self.lines.append(text)

    def notice(self, text: str) -> None:
        self.lines.append(f"note: {text}")


@pytest.fixture(scope="session")
def tiny_base(byte_base: Path) -> Path:
    """The base of bytes, because lengths of answers are counted in bytes here."""
    return byte_base


@pytest.fixture
def worker(silo: SiloConfig) -> Worker:
    make_private(Path(silo.state))
    return Worker(silo, Lines())


def request(worker: Worker, kind: str, content: RecordDict, **fields: str) -> tuple[dict[str, str], RecordDict]:
    return deserialize(worker.reply(serialize({"kind": kind} | fields, content)))


def asking(worker: Worker, recipe: str, run: str = RUN) -> Ask:
    def ask(kind: str, content: RecordDict) -> RecordDict:
        fields, reply = request(worker, kind, content, run=run, recipe=recipe)
        assert fields == {}
        return reply

    return ask


def encoded(answers: dict[str, RecordDict]) -> dict[str, list[bytes]]:
    return {kind: [*encoded_objects(content)] for kind, content in answers.items()}


def left_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_worker_answers_as_the_in_process_client_does(
    worker: Worker, silo: SiloConfig, handed: Handed, tmp_path: Path
) -> None:
    config = handed("lora.dropout=0.1")
    answers = converse(asking(worker, config.to_toml()))
    mine = for_silo(config, silo)
    resident = Resident(Workspace(mine), mine, tmp_path / "here")
    expected = converse(lambda kind, content: answer(kind, content, resident.client("clinic")))
    assert encoded(answers) == encoded(expected)
    theirs, ours = left_in(Path(silo.state) / "runs" / RUN), left_in(tmp_path / "here")
    assert "personal/clinic.safetensors" in ours
    assert {name: theirs[name] for name in ours} == ours
    assert theirs.keys() - ours.keys() == {"choices.json", "config.toml", "partition.json", "received.safetensors"}


def test_the_base_is_loaded_once_for_all_messages_and_runs(
    worker: Worker, silo: SiloConfig, handed: Handed
) -> None:
    first, second = handed().to_toml(), handed("method.name=fedavg").to_toml()
    before = [n for n, _ in worker._base.model.named_parameters()]  # type: ignore[union-attr]
    alone = encoded(converse(asking(worker, first)))
    converse(asking(worker, second, OTHER))
    assert encoded(converse(asking(worker, first, "a" * 32))) == alone  # the other run has left nothing in the base
    worker._release()
    assert [n for n, _ in worker._base.model.named_parameters()] == before  # type: ignore[union-attr]
    assert worker.loads == 1
    lines = worker.observer.lines  # type: ignore[attr-defined]
    assert sum("base loaded" in line for line in lines) == 1
    assert any(line.startswith("run 01234567, round 1: trained, ") for line in lines)
    listed = kept_runs(Path(silo.state), "clinic", Ledger(Path(silo.state), silo.policy))
    kept = {kept.run: (kept.method, kept.round) for kept in listed}
    assert kept == {RUN: ("flex", 1), OTHER: ("fedavg", 1), "a" * 32: ("flex", 1)}


def test_a_run_does_not_go_on_with_another_recipe(tmp_path: Path, handed: Handed) -> None:
    keep_recipe(tmp_path, handed().to_toml())
    keep_recipe(tmp_path, handed().to_toml())
    with pytest.raises(ArtifactError, match=r"another recipe \(seed: 0, now 1\); start a new run"):
        keep_recipe(tmp_path, handed("seed=1").to_toml())


def test_a_message_that_comes_twice_gets_the_same_answer(worker: Worker, silo: SiloConfig, handed: Handed) -> None:
    ask = asking(worker, handed().to_toml())
    once = encoded(converse(ask))
    kept = load_personal(Path(silo.state) / "runs" / RUN / "personal" / "clinic.safetensors")
    assert encoded(converse(ask)) == once
    again = load_personal(Path(silo.state) / "runs" / RUN / "personal" / "clinic.safetensors")
    assert kept[1] == again[1]
    assert all(tensor.equal(again[0][name]) for name, tensor in kept[0].items())


def test_a_recipe_with_the_other_storage_type_has_the_base_loaded_again(worker: Worker, handed: Handed) -> None:
    join = records({})
    for dtype, loads in (("float32", 1), ("bfloat16", 2), ("bfloat16", 2), ("float32", 3)):
        recipe = handed(f"model.dtype={dtype}").to_toml()
        run = {"float32": RUN, "bfloat16": OTHER}[dtype]
        fields, reply = request(worker, "query.join", join, run=run, recipe=recipe)
        assert (fields, worker.loads) == ({}, loads)
        assert info_of(reply)["client"] == "clinic"


@pytest.mark.parametrize("run", BAD_RUNS)
def test_a_run_that_is_no_id_writes_nothing(worker: Worker, handed: Handed, tmp_path: Path, run: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    fields, reply = request(worker, "query.join", records({}), run=run, recipe=handed().to_toml())
    assert fields == {"error": "FederationError"}
    assert not reply
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_keeps_its_recipe(worker: Worker, handed: Handed) -> None:
    """Two recipes under one id would mix two runs' personal states."""
    assert request(worker, "query.join", records({}), run=RUN, recipe=handed().to_toml())[0] == {}
    other = handed("seed=1").to_toml()
    assert request(worker, "query.join", records({}), run=RUN, recipe=other)[0] == {"error": "ArtifactError"}
    assert request(worker, "query.join", records({}), run=RUN, recipe=handed().to_toml())[0] == {}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "FederationError"),
        ({"kind": "train"}, "FederationError"),
        ({"kind": "query.secrets", "run": RUN, "recipe": ""}, "FederationError"),
        ({"kind": "query.join", "run": RUN, "recipe": "["}, "ConfigError"),
        ({"kind": "query.join", "run": RUN, "recipe": "data.at_silos = true\nmethod.name = 'no'"}, "ConfigError"),
        ({"kind": "train", "run": RUN, "recipe": None}, "FederationError"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_one_answered(
    worker: Worker, handed: Handed, fields: dict[str, Any], error: str
) -> None:
    recipe = handed().to_toml()
    fields = {name: recipe if value is None else value for name, value in fields.items()}
    assert deserialize(worker.reply(serialize(fields, records({}))))[0] == {"error": error}
    assert deserialize(worker.reply(b"noise"))[0] == {"error": "FederationError"}
    assert request(worker, "query.join", records({}), run=RUN, recipe=recipe)[0] == {}


SECRET = "xylophone"


def test_the_text_of_an_error_stays_in_the_silos_log(
    worker: Worker, silo: SiloConfig, handed: Handed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row's passage stands in train and in test: the log names the row, the reply nothing, and none quotes it."""
    row = {"instruction": "Sum up.", "context": f"The {SECRET} of Mrs Doe.", "response": "It rang."}
    for side in ("train", "test"):
        (tmp_path / f"{side}.jsonl").write_text(json.dumps(row) + "\n")
    files = {side: str(tmp_path / f"{side}.jsonl") for side in ("train", "test")}
    worker.silo = silo.model_copy(update={"data": silo.data.model_copy(update=files)})
    recipe = handed().to_toml()
    reply = worker.reply(serialize({"kind": "query.join", "run": RUN, "recipe": recipe}, records({})))
    assert deserialize(reply)[0] == {"error": "DataError"}
    assert SECRET.encode() not in reply
    assert str(tmp_path).encode() not in reply
    assert f"{tmp_path}/test.jsonl, line 1, row 1 and {tmp_path}/train.jsonl, line 1, row 1" in caplog.text
    assert SECRET not in caplog.text
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]
    assert caplog.records[0].exc_info is None
    worker.silo = silo
    assert request(worker, "query.join", records({}), run=RUN, recipe=recipe)[0] == {}


def test_an_unforeseen_failure_is_logged_whole_and_told_by_its_class(
    worker: Worker, handed: Handed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> RecordDict:
        raise ZeroDivisionError(SECRET)

    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(worker_module, "answer", fail)
    reply = worker.reply(serialize({"kind": "query.join", "run": RUN, "recipe": handed().to_toml()}, records({})))
    assert deserialize(reply)[0] == {"error": "ZeroDivisionError"}
    assert SECRET.encode() not in reply
    assert "Traceback" in caplog.text
    assert SECRET in caplog.text


def test_a_silo_says_before_round_1_which_references_no_answer_can_reach(worker: Worker, handed: Handed) -> None:
    request(worker, "query.join", records({}), run=RUN, recipe=handed("evaluation.max_new_tokens=3").to_toml())
    [note] = [line for line in worker.observer.lines if line.startswith("note: ")]  # type: ignore[attr-defined]
    assert "with evaluation.max_new_tokens = 3, answers are shorter than these references: clinic 4 of 4" in note


def test_a_silo_without_a_limit_chooses_by_its_own_rows_and_reports_it(
    worker: Worker, handed: Handed, silo: SiloConfig
) -> None:
    config = handed()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"max_new_tokens": None})})
    told = converse(asking(worker, config.to_toml()))["evaluate"].metric_records["metrics"]
    longest = max(len(row.response.encode()) for row in Workspace(for_silo(config, silo)).clients["clinic"].train)
    limit = told["max_new_tokens"]
    assert isinstance(limit, int)
    assert limit // 2 < longest + 1 <= limit
    assert {"longer_references", "cut.zero_shot", "cut.global", "cut.personalized"} <= {*told}


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("what", ["a row more", "another answer", "a passage more in a file that is split"])
def test_a_run_takes_no_other_rows_than_it_started_with(
    silo: SiloConfig, handed: Handed, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are read again by a new worker; the record of counts and hashes stays in the run's own state folder."""
    own = tmp_path / "own.jsonl"
    own.write_text(Path(silo.data.train).read_text())
    split = "split" in what
    data = silo.data.model_copy(update={"train": str(own), "test": None if split else silo.data.test})
    silo = silo.model_copy(update={"data": data})
    recipe = handed().to_toml()
    make_private(Path(silo.state))
    converse(asking(Worker(silo), recipe))
    note = Path(silo.state) / "runs" / RUN / "partition.json"
    before = note.read_bytes()
    assert set(json.loads(before)["clients"]) == {"clinic"}
    first, *rest = lines_of(own)
    row = json.loads(first)
    if what == "another answer":
        first = json.dumps({**row, "response": "Quite another one."})
    else:
        rest.append(json.dumps({**row, "context": "A new passage.", "passage": "new"}))
    own.write_text("\n".join([first, *rest]) + "\n")
    caplog.set_level(logging.ERROR)
    fields, _ = request(Worker(silo), "query.join", records({}), run=RUN, recipe=recipe)
    assert fields == {"error": "DataError"}
    (said,) = [r.getMessage() for r in caplog.records]
    assert "clinic: train" in said
    assert "rows" in said
    assert "A new passage." not in said
    assert "Quite another one." not in said
    assert note.read_bytes() == before
    assert (
        request(Worker(silo), "query.join", records({}), run=OTHER, recipe=recipe)[0] == {}
    )  # a new run takes them


def test_a_run_of_an_earlier_version_is_noted_as_it_is_found(silo: SiloConfig, handed: Handed) -> None:
    make_private(Path(silo.state))
    recipe = handed().to_toml()
    converse(asking(Worker(silo), recipe))
    (Path(silo.state) / "runs" / RUN / "partition.json").unlink()

    class Notices(Observer):
        told: list[str] = []  # noqa: RUF012

        def notice(self, text: str) -> None:
            self.told.append(text)

    assert request(Worker(silo, Notices()), "query.join", records({}), run=RUN, recipe=recipe)[0] == {}
    assert [text for text in Notices.told if text.startswith("run")] == [
        f"run {RUN[:8]}: its first rows are not on record; the current rows are recorded now"
    ]
    assert (Path(silo.state) / "runs" / RUN / "partition.json").exists()


def test_a_run_may_be_given_other_rounds(silo: SiloConfig, handed: Handed, worker: Worker) -> None:
    """How many there are is the server's to say; all else of the recipe stays."""
    converse(asking(worker, handed().to_toml()))
    longer = handed("federation.rounds=7").to_toml()
    assert request(worker, "query.join", records({}), run=RUN, recipe=longer)[0] == {}
    assert (Path(silo.state) / "runs" / RUN / "config.toml").read_text() == longer
    other = handed("federation.rounds=7", "training.lr=0.5").to_toml()
    assert request(worker, "query.join", records({}), run=RUN, recipe=other)[0] == {"error": "ArtifactError"}
    assert (Path(silo.state) / "runs" / RUN / "config.toml").read_text() == longer
