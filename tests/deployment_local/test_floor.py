"""A floor of a deployed run: each silo chooses as in one process, keeps the choice, and sends nothing of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from flexperts.artifacts import RunDirectory
from flexperts.client.client import Client
from flexperts.communication.messages import info_of, payload_of, records
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.data.silos.generate import write_silos
from flexperts.deployment.home import HomeModel, HomeRun
from flexperts.deployment.settings import at_silos
from flexperts.deployment.state import make_private
from flexperts.deployment.worker import Worker
from flexperts.engines.grid import InProcessGrid
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.files import holding
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer, observing
from flexperts.parameters.store import PersonalMeta
from flexperts.parameters.vector import Payload, vector_hash
from flexperts.recipe import load_silo
from flexperts.server.serve import serve
from flexperts.serving.engine.additions import all_models
from flexperts.studies.collect import collect_run

from .asking import RUN, Ask, converse, serving, through_relay

SILOS = ("clinic", "law_firm")
FLOOR = 'floor={candidates = ["global", "local", "personalized", "mixture"]}'
SHORT = ("training.local_steps=2", "evaluation.rows=2", "federation.min_clients=2", "data.validation_rows=8", FLOOR)


@pytest.fixture
def roomy(silo_file: Path, silos: Path, tmp_path: Path) -> Path:
    """The file of a silo with rows enough for a floor, and a state folder."""
    write_silos(tmp_path / "rows", 0, 20, 4)
    silo_file.write_text(silo_file.read_text().replace(str(silos), str(tmp_path / "rows")))
    make_private(tmp_path / "state")
    return silo_file


@pytest.mark.parametrize("policy", ["min_score_rows = 2", "scores = false"])
def test_a_silo_chooses_as_in_one_process_and_sends_nothing_of_it(
    recipe: Callable[..., RunConfig], tmp_path: Path, tiny_base: Path, policy: str
) -> None:
    rows = tmp_path / "rows"
    write_silos(rows, 0, 20, 4)
    files = {name: f"{{train = '{rows}/{name}/train.jsonl', test = '{rows}/{name}/test.jsonl'}}" for name in SILOS}
    clients = ", ".join(f"{name} = {sides}" for name, sides in files.items())
    config = recipe(f"data={{clients = {{{clients}}}}}", *SHORT)
    run_federation(config, tmp_path / "one")
    handed, replies = at_silos(config), {}
    nodes, paths = {}, {}
    for number, name in enumerate(SILOS, 1):
        (tmp_path / name).mkdir()
        paths[name] = tmp_path / name / "silo.toml"
        head = f'name = "{name}"\nstate = "state"\nbase = "{tiny_base}"\ndtype = "float32"\ndevice = "cpu"\n'
        sides = "\n".join(f'{side} = "{rows / name / side}.jsonl"' for side in ("train", "test"))
        its = policy if name == "clinic" else "min_score_rows = 2"
        paths[name].write_text(f"{head}[data]\n{sides}\n[policy]\n{its}\n")
        nodes[number] = heard(through_relay(paths[name], handed.to_toml()), replies)
    server = RunDirectory.create(tmp_path / "server", handed.to_toml())
    said: list[str] = []

    class Heard(Observer):
        def stage(self, text: str) -> None:
            said.append(text)

    with ExitStack() as stack:
        for name, path in paths.items():
            make_private(tmp_path / name / "state")
            stack.enter_context(serving(tmp_path / name / "state", Worker(load_silo(path), Heard()).reply))
        serve(InProcessGrid(nodes), handed, server, Observer())
    for name, path in paths.items():
        home = tmp_path / name / "state" / "runs" / server.run_id
        record, same = (json.loads((at / "floor" / f"{name}.json").read_text()) for at in (home, tmp_path / "one"))
        assert (record["chosen"], record["validation"]) == (same["chosen"], same["validation"])
        if policy == "scores = false" and name == "clinic":
            assert record["test"] is None
        else:
            assert record["test"] == same["test"]
            assert any(f"evaluated; this silo keeps {record['chosen']}, which is not sent" in line for line in said)
        asked = ("Summarise the note.", "The cabinet needs a new code.")
        assert HomeModel(load_silo(path), server.run_id).generate(*asked) == TrainedRun(tmp_path / "one").generate(
            name, *asked
        )
        assert str(all_models(HomeRun(load_silo(path), server.run_id))[-1]) == name
    assert not list(server.path.rglob("floor"))
    assert "floor" not in server.summary()
    assert "floor" not in collect_run(server.path)["entries"][0]
    words = ("chosen", "local", "mixture")
    assert replies["evaluate"]
    assert not [name for names in replies.values() for name in names for word in words if word in name]


@pytest.mark.parametrize("policy", ["min_score_rows = 1", "scores = false"])
def test_a_silo_that_dies_in_its_second_training_has_its_final_model(
    handed: Callable[..., RunConfig],
    roomy: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
) -> None:
    """The shared weights are at the silo before its local model trains; weights that do not fit replace none."""
    roomy.write_text(roomy.read_text().replace("min_score_rows = 1", policy))
    silo = load_silo(roomy)
    recipe, sent = handed("federation.rounds=1", "data.validation_rows=8", FLOOR).to_toml(), []

    class Killed(BaseException):
        """As of a signal."""

    def ask(kind: str, content: RecordDict) -> RecordDict:
        sent.append(content)
        return deserialize(worker.reply(serialize({"run": RUN, "kind": kind, "recipe": recipe}, content)))[1]

    def dies(self: Client, meta: PersonalMeta) -> None:
        raise Killed

    worker = Worker(silo)
    monkeypatch.setattr(Client, "_train_alone", dies)
    with pytest.raises(Killed):
        converse(ask)
    home = HomeModel(silo, RUN)
    expected = payload_of(sent[-1], "server")
    assert vector_hash(home.request.payload.vector) == vector_hash(expected.vector)
    assert home.generate("Which?", state="global") is not None
    other = records(dict(info_of(sent[-1])), payload=Payload.of({"nothing": torch.ones(3)}))
    fields, _ = deserialize(worker.reply(serialize({"run": RUN, "kind": "evaluate", "recipe": recipe}, other)))
    assert fields == {"error": "FederationError"}
    assert HomeModel(silo, RUN).request.payload.digest() == home.request.payload.digest()


def test_before_the_last_round_a_silo_does_not_choose(
    handed: Callable[..., RunConfig], roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own model is then the method's: to choose now would train the local model, for rounds that may change."""
    silo = load_silo(roomy)
    worker = Worker(silo)
    settings = "federation.rounds=2", "evaluation.every=1", "data.validation_rows=8", FLOOR
    recipe = handed(*settings).to_toml()
    converse(asking(worker, recipe))
    monkeypatch.setattr(Client, "_train_alone", None)
    home, folder = HomeModel(silo, RUN), kept_in(silo)
    assert home.generate("Which?") == home.generate("Which?", state="personalized")
    with pytest.raises(ConfigError, match="state 'chosen' after round 1: a client chooses after the last round"):
        home.generate("Which?", state="chosen")
    assert [str(m) for m in all_models(HomeRun(silo, RUN))] == ["clinic@zero_shot", "clinic@global", "clinic"]
    assert not (folder / "floor").exists()
    assert not (folder / "personal/local").exists()


def test_a_silo_chooses_in_one_process_at_a_time(handed: Callable[..., RunConfig], roomy: Path) -> None:
    """Its worker and `silo generate` would write the same local model; the second one takes the other's choice."""
    silo = load_silo(roomy)
    recipe = handed("federation.rounds=1", "data.validation_rows=8", FLOOR).to_toml()
    worker = Worker(silo)
    converse(asking(worker, recipe))
    record, local = kept_in(silo) / "floor/clinic.json", kept_in(silo) / "personal/local/personal"
    made, aside = record.read_bytes(), record.with_name("aside")
    record.rename(aside)
    local = local.rename(local.with_name("away"))
    begun = threading.Event()

    def chooses() -> None:
        with holding(record.with_suffix(".lock"), record):
            begun.set()
            time.sleep(1)
            local.rename(local.with_name("personal"))
            aside.rename(record)

    other = threading.Thread(target=chooses)
    other.start()
    begun.wait()
    said: list[str] = []

    class Heard(Observer):
        def notice(self, text: str) -> None:
            said.append(text)

    with observing(Heard()):
        HomeModel(silo, RUN).generate("Which?")
    other.join()
    assert record.read_bytes() == made
    assert [line for line in said if "waiting up to 3600 s for process" in line]


def asking(worker: Worker, recipe: str) -> Ask:
    def ask(kind: str, content: RecordDict) -> RecordDict:
        return deserialize(worker.reply(serialize({"run": RUN, "kind": kind, "recipe": recipe}, content)))[1]

    return ask


def kept_in(silo: SiloConfig) -> Path:
    return Path(silo.state) / "runs" / RUN


def heard(ask: Callable[..., RecordDict], replies: dict[str, set[str]]) -> Callable[..., RecordDict]:
    """Note the names of all that a silo sends, by kind of request."""

    def asked(kind: str, content: RecordDict) -> RecordDict:
        reply = ask(kind, content)
        names = {f"{record}.{key}" for record, values in reply.items() for key in values}
        replies.setdefault(kind, set()).update(names)
        return reply

    return asked
