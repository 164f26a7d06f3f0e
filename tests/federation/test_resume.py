"""A run that was broken off and taken up again leaves what an unbroken run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer
from flexperts.parameters.store import load_personal
from flexperts.server.checkpoint import load_server

Recipe = Callable[..., RunConfig]
CLIENTS = ["clinic", "help_desk", "law_firm", "shop"]
SHORT = ("evaluation.max_new_tokens=2", "evaluation.rows=2", "federation.rounds=3", "lora.dropout=0.1")


class BrokenOffError(Exception):
    """What stands for a power cut."""


class AfterRound(Observer):
    """Breaks the run off when a round is finished and written down."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round(self, record: Mapping[str, Any]) -> None:
        if record["number"] == self.number:
            raise BrokenOffError


class WithinRound(Observer):
    """Breaks the run off when the given client of those that train in a round takes its first step."""

    def __init__(self, number: int, client: int) -> None:
        self.task, self.client = f"round {number}", client
        self.seen: list[str] = []

    def progress(self, task: str, done: int, total: int) -> None:
        if task.endswith(self.task):
            self.seen = [*self.seen, task] if task not in self.seen else self.seen
            if len(self.seen) == self.client:
                raise BrokenOffError


class AtEvaluation(Observer):
    """Breaks the run off in the last evaluation, when all clients have trained for the last time."""

    def progress(self, task: str, done: int, total: int) -> None:
        if task.startswith("law_firm: global"):
            raise BrokenOffError


class Stages(Observer):
    """Remembers the stages of a run and the experts that were selected."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.selected: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def chosen(self, client: str, choice: Any) -> None:
        self.selected.append(client)


def no_measures(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: no_measures(v) for k, v in value.items() if k not in ("seconds", "peak_memory", "sha256")}
    return value


def left_behind(folder: Path) -> dict[str, Any]:
    """Return every file of a run, whole but for wall times; every run has an id of its own."""
    files: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "run_id"):
        content: Any = path.read_bytes()
        if path.name == "rounds.jsonl":
            content = [no_measures(json.loads(line)) for line in content.decode().splitlines()]
        elif path.name == "summary.json":
            content = no_measures(json.loads(content))
        files[str(path.relative_to(folder))] = content
    return files


def whole(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def break_off(config: RunConfig, out: Path, observer: Observer) -> None:
    with pytest.raises(BrokenOffError):
        run_federation(config, out, observer)
    assert not (out / "summary.json").exists()


METHODS = [("flex", ()), ("fedavg", ()), ("flex", ("federation.participation=0.5",))]
IDS = ["flex", "fedavg", "half"]


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=IDS)
def test_a_run_taken_up_again_leaves_what_an_unbroken_one_does(
    recipe: Recipe, tmp_path: Path, method: str, settings: tuple[str, ...]
) -> None:
    """Checkpoint, personal states of both generations, predictions, adapter, rounds, summary: all of it."""
    config = recipe(f"method.name={method}", *SHORT, *settings)
    summary = run_federation(config, tmp_path / "straight")
    expected = left_behind(tmp_path / "straight")
    assert {"checkpoint.safetensors", "summary.json", "shared/adapter_model.safetensors"} < expected.keys()
    assert {f"personal/{c}.safetensors" for c in CLIENTS} < expected.keys()
    assert {f"predictions/{c}.jsonl" for c in CLIENTS} < expected.keys()
    breaks: dict[str, Observer] = {
        "after 1": AfterRound(1),
        "in 2": WithinRound(2, 2),
        "in 3": WithinRound(3, 2 if settings else 3),
    }
    if method == "flex" and not settings:
        breaks |= {
            "in 1": WithinRound(1, 2),
            "after 2": AfterRound(2),
            "after 3": AfterRound(3),
            "at the evaluation": AtEvaluation(),
        }
    for name, observer in breaks.items():
        out = tmp_path / name
        break_off(config, out, observer)
        resumed = run_federation(config, out, resume=True)
        assert no_measures(resumed) == no_measures(summary), name
        ours = left_behind(out)
        assert ours.keys() == expected.keys(), name
        assert [n for n in expected if ours[n] != expected[n]] == [], name


def test_breaking_off_again_and_again_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*SHORT)
    run_federation(config, tmp_path / "straight")
    out = tmp_path / "out"
    break_off(config, out, WithinRound(1, 3))
    for observer in (WithinRound(1, 2), WithinRound(2, 4), WithinRound(2, 2), AfterRound(2), WithinRound(3, 4)):
        with pytest.raises(BrokenOffError):
            run_federation(config, out, observer, resume=True)
    run_federation(config, out, resume=True)
    assert left_behind(out) == left_behind(tmp_path / "straight")


def test_only_what_is_missing_is_done(recipe: Recipe, tmp_path: Path) -> None:
    """Finished rounds are not trained again, and experts are selected once."""
    config, first, second = recipe(*SHORT), Stages(), Stages()
    break_off(config, tmp_path / "out", AfterRound(2))
    states = whole(tmp_path / "out")
    assert load_server(tmp_path / "out" / "checkpoint.safetensors").round == 2
    run_federation(config, tmp_path / "out", second, resume=True)
    assert [s for s in second.stages if s.startswith("round")] == ["round 3 of 3"]
    assert second.selected == []
    run_federation(config, tmp_path / "new", first, resume=True)  # nothing to take up: it starts
    assert [s for s in first.stages if s.startswith("round")] == [f"round {n} of 3" for n in (1, 2, 3)]
    assert first.selected == CLIENTS
    assert states["config.toml"] == (tmp_path / "out" / "config.toml").read_bytes()


def test_personal_states_go_on_from_the_round_of_the_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    """The one who has trained in the broken round keeps the state before it; the others' newest one is it."""
    break_off(recipe(*SHORT), tmp_path / "out", WithinRound(2, 3))
    personal = tmp_path / "out" / "personal"
    rounds = {c: load_personal(personal / f"{c}.safetensors")[1].round for c in CLIENTS}
    older = {c: load_personal(personal / "before" / f"{c}.safetensors")[1].round for c in CLIENTS}
    assert rounds == {"clinic": 2, "help_desk": 2, "law_firm": 1, "shop": 1}
    assert older == {"clinic": 1, "help_desk": 1, "law_firm": 0, "shop": 0}
    assert load_server(tmp_path / "out" / "checkpoint.safetensors").round == 1


def test_the_reference_is_taken_up_too(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*SHORT, "federation.rounds=2", "method.reference=fedavg")
    run_federation(config, tmp_path / "straight")
    out = tmp_path / "out"

    class InReference(WithinRound):
        def stage(self, text: str) -> None:
            if text == "fedavg: clients join":
                self.task, self.seen = "round 2", []

    with pytest.raises(BrokenOffError):
        run_federation(config, out, InReference(99, 3))
    assert (out / "summary.json").exists()
    assert not (out / "reference" / "summary.json").exists()
    method = {n: b for n, b in whole(out).items() if not n.startswith("reference") and n != "summary.json"}
    assert run_federation(config, out, resume=True)["reference"]["method"] == "fedavg"
    assert left_behind(out) == left_behind(tmp_path / "straight")
    after = whole(out)
    assert {n: after[n] for n in method} == method  # the method's own run was not touched


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "out"


def finish(config: RunConfig, out: Path) -> None:
    if not out.exists():
        run_federation(config, out)


def test_a_finished_run_returns_its_summary_and_changes_nothing(recipe: Recipe, finished: Path) -> None:
    finish(recipe(*SHORT), finished)
    before, observer = whole(finished), Stages()
    summary = run_federation(recipe(*SHORT), finished, observer, resume=True)
    assert {"sha256", *summary} == json.loads(before["summary.json"]).keys()
    assert summary.items() < json.loads(before["summary.json"]).items()
    assert whole(finished) == before
    assert observer.stages == []


@pytest.mark.parametrize(
    "override", ["seed=1", "training.lr=0.5", "method.name=fedavg", "data.silos.train_rows=12"]
)
@pytest.mark.parametrize("state", ["broken", "finished"])
def test_another_recipe_is_refused(
    recipe: Recipe, tmp_path: Path, finished: Path, override: str, state: str
) -> None:
    out = finished if state == "finished" else tmp_path / "out"
    if state == "finished":
        finish(recipe(*SHORT), out)
    else:
        break_off(recipe(*SHORT), out, WithinRound(1, 2))
    before = whole(out)
    key, _, value = override.partition("=")
    with pytest.raises(ArtifactError, match=rf"it holds a run with another recipe \({key}: .*, now .*{value}'?\)"):
        run_federation(recipe(*SHORT, override), out, resume=True)
    assert whole(out) == before


def test_without_resume_a_run_is_not_touched(recipe: Recipe, tmp_path: Path, finished: Path) -> None:
    finish(recipe(*SHORT), finished)
    break_off(recipe(*SHORT), tmp_path / "out", AfterRound(1))
    for out in (finished, tmp_path / "out"):
        before = whole(out)
        with pytest.raises(ArtifactError, match="it already holds a run"):
            run_federation(recipe(*SHORT), out)
        assert whole(out) == before


def test_a_broken_run_cannot_be_used_yet(recipe: Recipe, tmp_path: Path) -> None:
    break_off(recipe(*SHORT), tmp_path / "out", AfterRound(1))
    with pytest.raises(ArtifactError, match="the run has not finished"):
        TrainedRun(tmp_path / "out")


@pytest.mark.parametrize("damaged", ["checkpoint.safetensors", "personal/shop.safetensors"])
def test_damage_is_refused_and_not_started_afresh(recipe: Recipe, tmp_path: Path, damaged: str) -> None:
    break_off(recipe(*SHORT), tmp_path / "out", AfterRound(1))
    path = tmp_path / "out" / damaged
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="it is damaged"):
        run_federation(recipe(*SHORT), tmp_path / "out", resume=True)
