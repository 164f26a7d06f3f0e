"""A run with a floor ends with each client's best choice: what is compared, kept, stored, used and never sent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from flexperts.artifacts import RunDirectory
from flexperts.client.client import Resident
from flexperts.client.masking import Standing
from flexperts.client.request import Request
from flexperts.client.routing_log import prompt_batches
from flexperts.client.workspace import Workspace
from flexperts.communication.messages import encode
from flexperts.config.run import RunConfig
from flexperts.costs.plan import plan
from flexperts.engines.grid import InProcessGrid
from flexperts.engines.run import check_settings, run_federation
from flexperts.errors import ArtifactError, ConfigError, DataError, PrivacyError
from flexperts.export.exporting import export_run
from flexperts.finished.elsewhere import rows_elsewhere
from flexperts.finished.joining import join, join_left_out
from flexperts.finished.trained import TrainedRun
from flexperts.library.run import Run
from flexperts.methods.fedavg import FedAvg
from flexperts.methods.flex import Flex
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.turn import Turn
from flexperts.observer import Observer
from flexperts.parameters.store import load_personal
from flexperts.parameters.vector import Payload
from flexperts.protection.pipeline import checked_method
from flexperts.recipe import parse_recipe
from flexperts.server.region import Region
from flexperts.server.serve import serve
from flexperts.serving.contract import ModelName, find_model
from flexperts.serving.engine.additions import additions, all_models
from flexperts.serving.engine.lanes import Lanes
from flexperts.studies.collect import collect
from flexperts.studies.finished import Finished
from flexperts.terminal.display import floor_table

ALL = 'floor={candidates = ["global", "local", "personalized", "mixture"]}'


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients that answer every question in opposite ways."""
    folder = tmp_path_factory.mktemp("silos")
    for name, letter in (("north", "a"), ("south", "z")):
        for side, rows in (("train", 20), ("test", 4)):
            lines = (
                {
                    "instruction": f"{side} {i}?",
                    "context": f"{name} {side} {i}",
                    "response": letter * (4 + i % 3),
                }
                for i in range(rows)
            )
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{side}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def make(tiny_model: str, silos: Path) -> Callable[..., RunConfig]:
    def made(*overrides: str) -> RunConfig:
        text = f"""
            {tiny_model}
            [data]
            folder = "{silos}"
            validation_rows = 8
            [training]
            max_length = 128
            local_steps = 4
            lr = 0.02
            [federation]
            rounds = 2
            [evaluation]
            max_new_tokens = 2
            [floor]
        """
        return parse_recipe(text, overrides)

    return made


@pytest.fixture(scope="module")
def workspace(make: Callable[..., RunConfig]) -> Workspace:
    return Workspace(make())


def kept(summary: dict[str, Any]) -> dict[str, str]:
    return {name: its["chosen"] for name, its in summary["floor"].items()}


def after_training(monkeypatch: pytest.MonkeyPatch, kind: type[Method], spoil: Callable[[Turn], None]) -> None:
    """Change what a method has trained, before it is kept and sent."""
    train = kind.train

    @torch.no_grad()
    def spoiled(self: Any, turn: Turn) -> Any:
        with torch.enable_grad():
            result = train(self, turn)
        spoil(turn)
        return result

    monkeypatch.setattr(kind, "train", spoiled)


def harmful_graft(turn: Turn) -> None:
    for name, parameter in turn.split.personal.items():
        parameter.mul_(-30) if ".personal." in name else None


def wrong_way(turn: Turn) -> None:
    for name, parameter in turn.split.shared.items():
        parameter.mul_(-5) if ".lora_B." in name else None


ONCE = ("federation.rounds=1", "training.local_steps=12")
OPPOSITE = ("method.name=fedavg", 'floor={candidates = ["global", "local"]}', "training.local_steps=30")


@pytest.mark.usefixtures("exports_checked_here")
@pytest.mark.parametrize(
    ("expected", "settings", "spoil"),
    [
        ("global", ONCE, (Flex, harmful_graft)),
        ("zero_shot", (*ONCE, "method.name=fedavg"), (FedAvg, wrong_way)),
        ("local", OPPOSITE, None),
    ],
    ids=["global", "base", "local"],
)
def test_the_choice_is_the_clients_model_from_then_on(
    make: Callable[..., RunConfig],
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: str,
    settings: tuple[str, ...],
    spoil: tuple[type[Method], Callable[[Turn], None]] | None,
) -> None:
    if spoil:
        after_training(monkeypatch, *spoil)
    out = tmp_path / "run"
    summary = run_federation(make(*settings), out, workspace=workspace)
    assert set(kept(summary).values()) == {expected}
    run = TrainedRun(out, workspace)
    try:
        assert run.state(None) == "chosen"
        scores = run.evaluate(rows=run.own_rows())["north"]
        assert scores["chosen"].nll == summary["floor"]["north"]["test"][expected]
        asked = "test 0?", "north test 0"
        if expected in scores:
            assert scores["chosen"] == scores[expected]
            assert run.generate("north", *asked) == run.generate("north", *asked, expected)
        else:
            assert scores["chosen"].nll < scores["global"].nll
            assert str(run.generate("north", *asked))[:2] == "aa"
        others = {state for state in scores if state not in ("chosen", expected)}
        assert all(scores[state].nll is None or scores[state].nll > scores["chosen"].nll for state in others)
    finally:
        run.close()
    done = export_run(out, tmp_path / "model", client="north")
    assert (done.state, oct((tmp_path / "model").stat().st_mode & 0o777)) == ("chosen", "0o700")
    assert f"by its validation rows: {expected}" in (tmp_path / "model" / "README.md").read_text()
    if expected == "zero_shot":
        with pytest.raises(ConfigError, match="the model is the unchanged base"):
            export_run(out, tmp_path / "adapter", client="north", form="adapter", check=False)
    rendered = floor_table(summary)
    assert rendered.row_count == 2


def test_the_record_says_what_was_compared_and_only_the_table_is_in_the_summary(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """flex has every candidate; a validation row is neither trained on nor tested, and no score by row leaves."""
    summary = run_federation(make(ALL), tmp_path, workspace=workspace.for_run(make(ALL)))
    record = RunDirectory(tmp_path).of_client("floor", "north")
    names = ["zero_shot", "global", "local", "personalized", "mixture 0.25", "mixture 0.5", "mixture 0.75"]
    assert list(record["validation"]["nll"]) == list(record["test"]["nll"]) == names
    rows = workspace.clients["north"]
    assert {len(its) for its in record["validation"]["rows"].values()} == {len(rows.validation)} == {8}
    assert {len(its) for its in record["test"]["rows"].values()} == {len(rows.test)} == {4}
    assert len(rows.train) == 12
    assert not {row.context for row in rows.validation} & {row.context for row in (*rows.train, *rows.test)}
    assert summary["floor"]["north"] == {
        "chosen": record["chosen"], "validation": record["validation"]["nll"], "test": record["test"]["nll"]
    }  # fmt: skip
    assert record["test"]["nll"]["global"] == summary["clients"]["north"]["nll"]["global"]
    assert "chosen" not in summary["clients"]["north"]["nll"]
    assert summary["bytes"]["personal_sent"] == 0


@pytest.mark.usefixtures("exports_checked_here")
def test_a_share_of_the_graft_lies_between_and_is_what_is_exported_and_served(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the factor of every personal expert is the weight, and all else is the personalized model's."""
    out = tmp_path / "run"
    monkeypatch.setattr("flexperts.client.client.choose", lambda nlls, tokens: "mixture 0.5")
    run_federation(make(), out, workspace=workspace)
    run = TrainedRun(out, workspace)
    try:
        models = all_models(run)
        assert [str(m) for m in models][:4] == ["north@zero_shot", "north@global", "north@personalized", "north"]
        own, whole = find_model("north", models), find_model("north@personalized", models)
        mixed, full = additions(run, own), additions(run, whole)
        assert own.state == "chosen"
        assert mixed is not None
        assert full is not None
        assert mixed.lora_key == full.lora_key
        for layer, [graft] in mixed.grafts.items():
            [other] = full.grafts[layer]
            assert (graft.scales, other.scales) == ((0.5,), (1.0,))
            assert all(torch.equal(a, b) for a, b in zip(graft.parameters(), other.parameters(), strict=True))
    finally:
        run.close()
    assert export_run(out, tmp_path / "model", client="north").difference is not None


@pytest.mark.usefixtures("exports_checked_here")
@pytest.mark.parametrize("name", ["ditto", "fedper", "feddpa_t"])
def test_between_global_and_personal_of_private_adapters(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At weights near 0 and 1 the model nears global and personalized; weighted adapters are exported as one."""
    config = make(f"method.name={name}", "training.personal_lr=0.05")
    monkeypatch.setattr("flexperts.client.client.choose", lambda nlls, tokens: "mixture 0.5")
    run_federation(config, tmp_path / "run", workspace=workspace)
    run = TrainedRun(tmp_path / "run", workspace)
    client, request, found = run.client("north"), run.request("north"), {}
    [batch] = prompt_batches(workspace.encoder, client.rows.test[:1], 1)

    def logits(weight: float | None, state: str = "global") -> torch.Tensor:
        with client.in_use(request) as turn:
            context = client.method.mixed(turn, weight) if weight is not None else None
            with context or client.method.in_state(turn, state) as on_batch, torch.no_grad():
                if on_batch:
                    on_batch(batch)
                return turn.model(input_ids=batch.input_ids).logits

    try:
        found = {weight: logits(weight) for weight in (1e-6, 0.5, 1 - 1e-6)}
        torch.testing.assert_close(found[1e-6], logits(None), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found[1 - 1e-6], logits(None, "personalized"), atol=1e-3, rtol=1e-3)
        far = (logits(None) - logits(None, "personalized")).abs().max()
        for end in (found[1e-6], found[1 - 1e-6]):
            assert (found[0.5] - end).abs().max() > 0.1 * far > 0
    finally:
        run.close()
    if name == "ditto":
        assert export_run(tmp_path / "run", tmp_path / "adapter", client="north", form="adapter").difference
    if name == "feddpa_t":
        with pytest.raises(ConfigError, match="its weights change with every input"):
            export_run(tmp_path / "run", tmp_path / "adapter", client="north")


def test_local_is_the_local_methods_run_and_cannot_be_encoded(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """Bit for bit what `method.name = local` would have trained, also beside a second adapter."""
    for method, alone, rounds in (("flex", "local", 2), ("ditto", "local_lora", 4)):  # Ditto trains two models
        own = tmp_path / alone
        run_federation(make(f"method.name={method}", ALL), tmp_path / method, workspace=workspace)
        run_federation(make(f"method.name={alone}", f"federation.rounds={rounds}"), own, workspace=workspace)
        tensors, meta = load_personal(tmp_path / method / "personal/local/personal/north.safetensors")
        expected, its = load_personal(own / "personal/north.safetensors")
        assert meta == its
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
        resident = Resident(workspace, make(f"method.name={method}", ALL), tmp_path / method)
        client = resident.client("north").alone
        with client.in_use(Request(Payload.empty(), None, rounds)) as turn:
            assert not turn.split.shared
            for name in tensors:
                with pytest.raises(PrivacyError, match="not in the shared group"):
                    encode(turn.split, {name: turn.split.personal[name]})
        resident.model.close()


def test_local_takes_as_many_rounds_as_a_client_takes_part_in(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """With all rounds it would have twice the steps of the models that it is compared with."""
    half = ("federation.rounds=4", "federation.participation=0.5")
    run_federation(make("method.name=fedavg", ALL, *half), tmp_path / "floor", workspace=workspace)
    run_federation(make("method.name=local_lora"), tmp_path / "alone", workspace=workspace)
    for name in ("north", "south"):
        tensors, meta = load_personal(tmp_path / f"floor/personal/local/personal/{name}.safetensors")
        expected, its = load_personal(tmp_path / f"alone/personal/{name}.safetensors")
        assert meta == its
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_local_takes_the_steps_of_rounds_in_which_all_clients_train(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """A warm-up of two rounds and half of the other four: four rounds, not three."""
    settings = ("method.options={warmup_rounds = 2}", "federation.rounds=6", "federation.participation=0.5")
    run_federation(make("method.name=fedlease", ALL, *settings), tmp_path / "floor", workspace=workspace)
    run_federation(make("method.name=local_lora", "federation.rounds=4"), tmp_path / "alone", workspace=workspace)
    tensors, meta = load_personal(tmp_path / "floor/personal/local/personal/north.safetensors")
    expected, its = load_personal(tmp_path / "alone/personal/north.safetensors")
    assert meta == its
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("method", "alone"),
    [
        ("method.options={finish = 2}", "local"),
        *((f"method.name={name}", "local_lora") for name in ("feddpa_f", "feddpa_t", "ditto")),
    ],
)
def test_local_takes_the_steps_of_extra_rounds_too(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path, method: str, alone: str
) -> None:
    """Those of finish, or of a second model; two rounds have half as many."""
    run_federation(make(ALL, method), tmp_path / "floor", workspace=workspace)
    run_federation(make(f"method.name={alone}", "federation.rounds=4"), tmp_path / "alone", workspace=workspace)
    tensors, meta = load_personal(tmp_path / "floor/personal/local/personal/north.safetensors")
    expected, its = load_personal(tmp_path / "alone/personal/north.safetensors")
    assert meta == its
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize("steps", [None, 3])
def test_a_newcomers_local_model_takes_as_many_steps_as_its_personal_part(
    make: Callable[..., RunConfig], workspace: Workspace, silos: Path, tmp_path: Path, steps: int | None
) -> None:
    """By default those of all rounds, also where a share of the clients trained in each."""
    config = make(ALL, "federation.participation=0.5", "training.local_seconds=2")
    run_federation(config, tmp_path / "run", workspace=workspace)
    rows = {side: silos / "north" / f"{side}.jsonl" for side in ("train", "test")}
    record = join(tmp_path / "run", rows["train"], test=rows["test"], name="east", workspace=workspace, steps=steps)
    assert record["steps"] == (steps or 2 * 4)
    files = f"data.clients={{east = {{train = '{rows['train']}', test = '{rows['test']}'}}}}"
    alone = make("data.folder=", files, "method.name=local", f"training.local_steps={record['steps']}", ONCE[0])
    run_federation(alone, tmp_path / "alone")
    tensors, meta = load_personal(tmp_path / "run/personal/local/personal/east.safetensors")
    expected, its = load_personal(tmp_path / "alone/personal/east.safetensors")
    assert meta == its
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    run = TrainedRun(tmp_path / "run", workspace)
    try:
        with run.client("east").in_state(run.request("east"), "local") as (model, _):
            assert model is not None
    finally:
        run.close()


def test_local_begins_again_where_the_number_of_rounds_has_changed(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """Its cosine is over the run's rounds. The method's model is the same here; the choice is made again."""
    settings = "method.name=local_lora", ALL, "federation.participation=0.5"
    found = {}
    for name, numbers in (("changed", (8, 4)), ("shrunk", (2, 4)), ("fresh", (4,))):
        run_federation(make(*settings, f"federation.rounds={numbers[0]}"), tmp_path / name, workspace=workspace)
        path = tmp_path / name / "personal/local/personal/north.safetensors"
        for rounds in numbers:
            resident = Resident(workspace, make(*settings, f"federation.rounds={rounds}"), tmp_path / name)
            client = resident.client("north")
            client.choice(Request(Payload.empty(), None, 8))
            resident.model.close()
            assert load_personal(path)[1].round == rounds // 2
        found[name] = load_personal(path)
    for name in ("changed", "shrunk"):
        assert found[name][1] == found["fresh"][1]
        assert all(torch.equal(found[name][0][key], found["fresh"][0][key]) for key in found["fresh"][0])


def test_a_missing_or_damaged_local_state_is_not_trained_anew(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    run_federation(make(*OPPOSITE), tmp_path, workspace=workspace)
    path = tmp_path / "personal/local/personal/north.safetensors"
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), path.unlink):
        damage()
        run = TrainedRun(tmp_path, workspace)
        with pytest.raises(ArtifactError, match=r"north\.safetensors"):
            run.generate("north", "which?")
        run.close()
    record = tmp_path / "floor/north.json"
    record.write_text(record.read_text().replace('"local"', '"global"', 1))
    run = TrainedRun(tmp_path, workspace)
    with pytest.raises(ArtifactError, match="its checksum does not fit"):
        run.generate("north", "which?")
    run.close()


def folder(path: Path) -> dict[str, bytes]:
    kinds = ("floor", "personal", "predictions")
    files = (file for kind in kinds for file in sorted((path / kind).rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_two_workers_and_one_end_with_the_same_files(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    one, two = (
        run_federation(make(ALL, f"engine.workers={n}", "engine.threads=1"), tmp_path / str(n)) for n in (1, 2)
    )
    assert one["floor"] == two["floor"]
    assert folder(tmp_path / "1") == folder(tmp_path / "2")


_KILLED = """
import os, signal, sys
from pathlib import Path
from flexperts.client.client import Client
from flexperts.engines.run import run_federation
from flexperts.recipe import parse_recipe

train, seen = Client.train, []
def dies(self, request):
    if "local" in str(self.folder):
        seen.append(self.name)
        if len(seen) == 4:  # the second client, in its second round alone
            os.kill(os.getpid(), signal.SIGKILL)
    return train(self, request)
Client.train = dies
run_federation(parse_recipe(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
"""


def test_a_run_killed_while_choosing_resumes_with_the_same_bits(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    config = make(ALL)
    (tmp_path / "recipe.toml").write_text(config.to_toml())
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "recipe.toml"), str(tmp_path / "killed")]
    ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert (tmp_path / "killed/floor/north.json").exists()
    assert not (tmp_path / "killed/floor/south.json").exists()
    resumed = run_federation(config, tmp_path / "killed", resume=True, workspace=workspace)
    whole = run_federation(config, tmp_path / "whole", workspace=workspace)
    assert resumed["floor"] == whole["floor"]
    assert folder(tmp_path / "killed") == folder(tmp_path / "whole")


def test_what_a_floor_needs(make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path) -> None:
    for settings, rule in (
        (
            ("data.validation_rows=4",),
            r"north: 4 validation rows \(and 1 more clients\): \[floor\] needs at least 8",
        ),
        (("data.validation_rows=11",), "north: 20 train rows with data.validation_rows = 11: at most half"),
    ):
        config = make(*settings)
        with pytest.raises(DataError, match=rule):
            run_federation(config, tmp_path / "run", workspace=workspace.for_run(config))
    with pytest.raises(ConfigError, match="they cannot be reported"):
        make("evaluation.split=validation")
    with pytest.raises(ConfigError, match="exclude each other"):
        make("data.validation_fraction=0.5")
    with pytest.raises(ConfigError, match=r"set data\.validation_rows"):
        parse_recipe("data.silos = {}\nfloor = {}")
    assert "[floor]" not in parse_recipe("data.silos = {}").to_toml()


def test_a_local_model_that_diverges_is_no_candidate(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """Its own rate is too high; the run ends as without it."""

    class Heard(Observer):
        def notice(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    config = make("method.name=fedavg", ALL, "training.personal_lr=1e30")
    summary = run_federation(config, tmp_path, Heard(), workspace=workspace)
    assert set(summary["floor"]["north"]["validation"]) == {"zero_shot", "global"}
    assert [line for line in said if line.startswith("north: no local model to choose")]


def test_a_newcomer_chooses_too(
    make: Callable[..., RunConfig], workspace: Workspace, silos: Path, tmp_path: Path
) -> None:
    run_federation(make(ALL), tmp_path, workspace=workspace.for_run(make(ALL)))
    rows = silos / "north"
    join(tmp_path, rows / "train.jsonl", test=rows / "test.jsonl", name="east", workspace=workspace)
    assert (tmp_path / "personal/local/personal/east.safetensors").exists()
    assert not (tmp_path / "joined/east.part").exists()
    left = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("east*")}
    folders = {"floor", "joined", "personal", "personal/local/personal", "predictions", "selection"}
    assert left == folders, "docs/joining.md lists what undoing a join deletes"
    record = RunDirectory(tmp_path).of_client("floor", "east")
    assert record["test"]["nll"][record["chosen"]] > 0
    run = TrainedRun(tmp_path, workspace)
    try:
        answer = run.generate("east", "test 0?", "north test 0")
        own = run.client("east").choice(run.request("east"))
        assert own["chosen"] == record["chosen"]
        assert isinstance(answer, str)
    finally:
        run.close()


def test_a_newcomer_chooses_also_where_the_method_trains_nothing_personal(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """The global model fits those who answer in the opposite way; all tables show the same state of all."""
    half = "federation.rounds=4", "federation.participation=0.5"
    config = make('data.leave_out=["south"]', *OPPOSITE, *half)
    own = workspace.for_run(config)
    run_federation(config, tmp_path, workspace=own)
    record = join_left_out(tmp_path, "south", own)
    assert record is not None
    assert record["steps"] == 0
    states = [tmp_path / f"personal/local/personal/{name}.safetensors" for name in ("north", "south")]
    assert [load_personal(state)[1].round for state in states] == [2, 2]
    chosen = RunDirectory(tmp_path).of_client("floor", "south")
    assert chosen["chosen"] == "local"
    assert chosen["test"]["nll"]["global"] == record["nll"]["global"] > chosen["test"]["nll"]["local"]
    entry = Finished("fedavg", (), {0: RunDirectory(tmp_path)})
    [found] = collect("", config.to_toml(), [entry], "fedavg", newcomers=["south"], resamples=100)["entries"]
    assert found["own_state"] == "chosen"
    assert "chosen" in found["newcomers"]
    run = TrainedRun(tmp_path, own)
    try:
        assert run.evaluate()["south"]["chosen"].nll == chosen["test"]["nll"]["local"]
    finally:
        run.close()


@pytest.mark.usefixtures("exports_checked_here")
@pytest.mark.parametrize("use", ["generate", "library", "export", "serve"])
def test_a_client_that_was_not_scored_chooses_when_it_is_used(
    make: Callable[..., RunConfig], silos: Path, tmp_path: Path, use: str
) -> None:
    """Whatever uses it first; it has no scores, and `evaluate` scores whom the run has scored."""
    bf16 = ("model.dtype=bfloat16", "model.precision=bf16")
    config = make("evaluation.clients=1", *ONCE, *bf16, 'floor={candidates = ["local"]}')
    summary = run_federation(config, tmp_path / "run")
    [scored] = summary["floor"]
    [other] = {"north", "south"} - {scored}
    path = tmp_path / "run" / "floor" / f"{other}.json"
    assert not path.exists()
    if use == "export":  # in another type than that in which the local model trains
        export_run(tmp_path / "run", tmp_path / "model", client=other, dtype="float32")
    elif use == "library":
        with Run(tmp_path / "run") as found:
            assert found.clients == ["north", "south"]
            assert [*found.scores["nll"]] == [scored]
            found.model(other).generate(["which?"])
    run = TrainedRun(tmp_path / "run")
    try:
        if use == "generate":
            run.generate(other, "which?")
            assert [*rows_elsewhere(run, [str(silos)])] == [scored]
            assert [*rows_elsewhere(run, [f"{other}={silos / other / 'test.jsonl'}"])] == [other]
        elif use == "serve":
            assert find_model(other, all_models(run)).state == "chosen"
            additions(run, find_model(other, all_models(run)))
        assert [*run.evaluate()] == [scored]
        made = json.loads(path.read_text())
        shutil.rmtree(tmp_path / "run/personal/local/personal")
        path.unlink()
        assert run.client(other).choice(run.request(other)).items() <= made.items()
    finally:
        run.close()


def test_serving_the_global_model_of_a_silo_that_has_not_chosen_does_not_choose(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Choosing may train a model, and needs rows."""
    summary = run_federation(make("evaluation.clients=1", ONCE[0], 'floor={candidates = ["local"]}'), tmp_path)
    [other] = {"north", "south"} - {*summary["floor"]}
    run = TrainedRun(tmp_path)
    lanes = Lanes(run)
    try:
        for state in ("global", "personalized"):
            assert lanes[ModelName(other, state, True)] is not None
        assert not (tmp_path / f"floor/{other}.json").exists()
        assert lanes[ModelName(other, "chosen", True)] is not None
        assert (tmp_path / f"floor/{other}.json").exists()
    finally:
        lanes.close()


def test_an_fdlora_newcomer_has_no_personal_model_to_choose(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """FDLoRA trains nothing personal in a round, so a newcomer has the global model; it may train a local one."""
    config = make("method.name=fdlora", ALL, 'data.leave_out=["south"]')
    own = workspace.for_run(config)
    run_federation(config, tmp_path, workspace=own)
    record = join_left_out(tmp_path, "south", own)
    assert record is not None
    assert record["steps"] == 0
    kept = json.loads((tmp_path / "floor/south.json").read_text())
    assert {*kept["validation"]["nll"]} == {"zero_shot", "global", "local"}
    assert not (tmp_path / "personal/settled/south.safetensors").exists()


def test_local_has_a_rate_of_its_own_and_the_silos_clock(
    make: Callable[..., RunConfig], workspace: Workspace, tmp_path: Path
) -> None:
    """In a deployment local_seconds is time, so that the steps of a round are all there."""
    usual = 'floor={candidates = ["local"]}', "training.personal_lr=0.3", "training.local_seconds=30"
    for settings, rate in (
        (usual, 0.3),
        (("training.lr=0.02", 'floor={candidates = ["local"], local_lr = 0.7}', *usual[1:]), 0.7),
    ):
        config = make(*settings, "federation.step_seconds={north = 20.0}")
        for standing, steps in ((None, 2), (Standing(), 4)):
            resident = Resident(workspace, config, tmp_path, standing)
            client = resident.client("north").alone
            assert client.config.training.personal_lr == rate
            assert (client._local_settings(1).steps, client.standing) == (steps, standing)
            resident.model.close()


@pytest.mark.parametrize(
    ("method", "candidates", "refused"),
    [
        ("fedavg", '["personalized", "mixture"]', r"add global or local, or leave \[floor\] out"),
        ("fedlease", '["global", "mixture"]', "with method.name = fedlease"),
        ("flex", "[]", "at least 1 item"),
        ("comigs", '["mixture"]', r"add global or personalized or local"),
        ("fedavg", '["global"]', None),
        ("zero_shot", '["global"]', None),
    ],
)
def test_a_floor_without_a_trained_candidate_is_refused(
    make: Callable[..., RunConfig], method: str, candidates: str, refused: str | None
) -> None:
    settings = f"method.name={method}", f"floor={{candidates = {candidates}}}", "federation.rounds=9"
    if refused is None:
        assert checked_method(make(*settings)).name == method
        return
    with pytest.raises(ConfigError, match=refused):
        checked_method(make(*settings))


def test_a_server_and_a_region_refuse_such_a_floor_before_they_ask_a_silo(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def asked(kind: str, content: object) -> NoReturn:
        raise AssertionError(f"{kind} was asked")

    settings = ["data.validation_rows=8", 'floor={candidates = ["mixture"]}']
    config, grid = make("method.name=fedavg", *settings), InProcessGrid({1: asked})
    for start in (
        lambda: serve(grid, config, RunDirectory(tmp_path), Observer()),
        lambda: Region("east", grid, config, RunDirectory(tmp_path), Observer()),
        lambda: plan(config.model.base, ["fedavg"], settings),
    ):
        with pytest.raises(ConfigError, match="so each client would keep the untouched base"):
            start()


@pytest.mark.parametrize("graft", ['place = "in_place"', 'sharing = "shared"'])
def test_a_floor_of_mixtures_needs_experts_that_can_be_mixed(make: Callable[..., RunConfig], graft: str) -> None:
    config = make("method.name=flex", 'floor={candidates = ["mixture"]}', f"graft={{{graft}}}")
    with pytest.raises(ConfigError, match="would keep the untouched base"):
        check_settings(config)


def test_a_reference_needs_a_candidate_too(make: Callable[..., RunConfig]) -> None:
    settings = "method.name=flex", 'floor={candidates = ["personalized"]}'
    check_settings(make(*settings))
    with pytest.raises(ConfigError, match=r"candidates = \[\"personalized\"\] with method.name = fedavg"):
        check_settings(make(*settings, "method.reference=fedavg"))
