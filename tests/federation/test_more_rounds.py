"""A run is given other rounds than it was started with: the schedule, what stays consistent, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.changes import rounds_before
from flexperts.config.run import RunConfig
from flexperts.data.silos.generate import write_silos
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, ConfigError
from flexperts.finished.joining import join
from flexperts.methods.kit import turn as turns
from flexperts.observer import Observer
from flexperts.server.checkpoint import load_server
from flexperts.server.extending import rate

from .test_resume import left_behind

SHORT = ("evaluation.max_new_tokens=2", "evaluation.rows=2", "training.local_steps=2", "lora.dropout=0.1")
Recipe = Callable[..., RunConfig]


class BrokenOffError(Exception):
    pass


class Watch(Observer):
    """Keeps stages and notices; breaks the run off when a client first trains in a round."""

    def __init__(self, task: str = "none") -> None:
        self.task, self.stages, self.notices = task, list[str](), list[str]()

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progress(self, task: str, done: int, total: int) -> None:
        if task == self.task:
            raise BrokenOffError


@pytest.fixture(scope="module")
def workspace(recipe: Recipe) -> Workspace:
    return Workspace(recipe(*SHORT))


def rounds_of(config: RunConfig, rounds: int) -> RunConfig:
    federation = config.federation.model_copy(update={"rounds": rounds})
    return config.model_copy(update={"federation": federation})


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Mean learning rate of each turn's steps, in the order of the turns."""
    seen: list[float] = []
    real = turns.train_local

    def noted(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        seen.append(result.lr_sum / result.steps)
        return result

    monkeypatch.setattr(turns, "train_local", noted)
    return seen


def cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / total))


def test_a_finished_run_goes_on_along_the_longer_cosine(
    recipe: Recipe, workspace: Workspace, tmp_path: Path, rates: list[float]
) -> None:
    """Two steps per round, peak 1e-3. Rounds 1, 2 as of two; rounds 3, 4 at the places 4..7 of a cosine over 8."""
    config = recipe(*SHORT, "federation.rounds=2", "training.lr=1e-3")
    out, watch = tmp_path / "run", Watch()
    first = run_federation(config, out, workspace=workspace)
    four = rounds_of(config, 4)
    summary = run_federation(four, out, watch, resume=True, workspace=workspace)
    by_round = [rates[i : i + 4] for i in range(0, 16, 4)]  # four clients
    expected = [
        (cosine(0, 4) + cosine(1, 4)) / 2,
        (cosine(2, 4) + cosine(3, 4)) / 2,
        (cosine(4, 8) + cosine(5, 8)) / 2,
        (cosine(6, 8) + cosine(7, 8)) / 2,
    ]
    assert by_round == [[pytest.approx(1e-3 * value)] * 4 for value in expected]
    assert [s for s in watch.stages if s.startswith("round")] == ["round 3 of 4", "round 4 of 4"]
    (notice,) = [text for text in watch.notices if "cosine" in text]
    assert "2 of 2 planned rounds are finished" in notice
    assert "round 3 starts at 50 % of the peak rate" in notice
    run = RunDirectory(out)
    assert run.config_toml == four.to_toml()
    assert [(r["number"], r["planned"]) for r in run.rounds()] == [(1, 2), (2, 2), (3, 4), (4, 4)]
    assert (first["planned"], summary["planned"]) == (
        [{"after": 0, "rounds": 2}],
        [{"after": 0, "rounds": 2}, {"after": 2, "rounds": 4}],
    )
    assert (summary["rounds"], load_server(run.checkpoint).round) == (4, 4)
    assert run_federation(four, out, resume=True) == summary
    with pytest.raises(ArtifactError, match=r"config\.toml has 4, and 4 rounds are finished"):
        run_federation(config, out, resume=True)


LATER = [pytest.param(task, marks=pytest.mark.faults) for task in ("shop: round 3", "help_desk: round 4")]


@pytest.mark.parametrize("task", ["clinic: round 3", *LATER])
def test_an_extension_that_breaks_off_is_taken_up_bit_for_bit(
    recipe: Recipe, workspace: Workspace, tmp_path: Path, task: str
) -> None:
    config = recipe(*SHORT, "federation.rounds=2", "method.reference=fedavg")
    four = rounds_of(config, 4)
    for name in ("straight", "broken"):
        run_federation(config, tmp_path / name, workspace=workspace)
    run_federation(four, tmp_path / "straight", resume=True, workspace=workspace)
    with pytest.raises(BrokenOffError):
        run_federation(four, tmp_path / "broken", Watch(task), resume=True, workspace=workspace)
    assert not (tmp_path / "broken" / "summary.json").exists()
    summary = run_federation(four, tmp_path / "broken", resume=True, workspace=workspace)
    assert left_behind(tmp_path / "broken") == left_behind(tmp_path / "straight")
    assert (summary["rounds"], summary["reference"]["rounds"]) == (4, 4)
    assert RunDirectory(tmp_path / "broken" / "reference").config_toml.count("rounds = 4") == 1


@pytest.mark.parametrize("rounds", [2, 3, 6])
def test_a_run_that_broke_off_can_be_given_other_rounds(
    recipe: Recipe, workspace: Workspace, tmp_path: Path, rounds: int
) -> None:
    config, out = recipe(*SHORT, "federation.rounds=4"), tmp_path / "run"
    with pytest.raises(BrokenOffError):
        run_federation(config, out, Watch("shop: round 2"), workspace=workspace)
    summary = run_federation(rounds_of(config, rounds), out, resume=True, workspace=workspace)
    assert summary["rounds"] == rounds
    assert summary["planned"] == [{"after": 0, "rounds": 4}, {"after": 1, "rounds": rounds}]


def test_a_kill_between_the_steps_of_an_extension(
    recipe: Recipe, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary has gone and the recipe is the old one: either recipe goes on from there."""
    config = recipe(*SHORT, "federation.rounds=2")
    summary = run_federation(config, tmp_path / "run", workspace=workspace)

    def killed(*_: object) -> None:
        raise BrokenOffError

    with monkeypatch.context() as patch:
        patch.setattr("flexperts.server.extending.write_text", killed)
        with pytest.raises(BrokenOffError):
            run_federation(rounds_of(config, 3), tmp_path / "run", resume=True, workspace=workspace)
    again = run_federation(config, tmp_path / "run", resume=True, workspace=workspace)
    assert {k: v for k, v in again.items() if k not in ("seconds", "peak_memory", "bytes")} == {
        k: v for k, v in summary.items() if k not in ("seconds", "peak_memory", "bytes")
    }


def test_what_cannot_be_extended(recipe: Recipe, workspace: Workspace, tmp_path: Path) -> None:
    out, config = tmp_path / "run", recipe(*SHORT, "federation.rounds=2")
    run_federation(config, out, workspace=workspace)
    with pytest.raises(ArtifactError, match="set a number above 2"):
        run_federation(rounds_of(config, 1), out, resume=True)
    other = recipe(*SHORT, "federation.rounds=3", "training.lr=0.5")
    with pytest.raises(ArtifactError, match="another recipe"):
        run_federation(other, out, resume=True)
    write_silos(tmp_path / "silos", 0, 8, 4)
    join(out, tmp_path / "silos" / "shop" / "train.jsonl", name="late", steps=1, workspace=workspace)
    with pytest.raises(ArtifactError, match="late joined after round 2"):
        run_federation(rounds_of(config, 3), out, resume=True)
    fixed = recipe(*SHORT, "federation.rounds=2", "method.name=feddpa_f")
    run_federation(fixed, tmp_path / "fixed", workspace=workspace)
    with pytest.raises(ConfigError, match="the run has 2, and feddpa_f trains an extra round"):
        run_federation(rounds_of(fixed, 4), tmp_path / "fixed", resume=True)


@pytest.mark.parametrize(
    ("passed", "warmup", "expected"),
    [(0.0, 0.0, 1.0), (0.5, 0.0, 0.5), (1.0, 0.0, 0.0), (0.05, 0.1, 0.5), (0.1, 0.1, 1.0), (0.55, 0.1, 0.5)],
)
def test_the_rate_that_is_told(passed: float, warmup: float, expected: float) -> None:
    assert rate(passed, warmup) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ("[federation]\nrounds = 2", "[federation]\nrounds = 3", 2),
        ("[federation]\nrounds = 2", "[federation]\nrounds = 2", None),
        ("seed = 1\n[federation]\nrounds = 2", "seed = 2\n[federation]\nrounds = 3", None),
        ("seed = 1", "seed = 1\n[federation]\nrounds = 3", None),
        ("no TOML", "[federation]\nrounds = 3", None),
        ("[federation]\nrounds = 'many'", "[federation]\nrounds = 3", None),
    ],
)
def test_recipes_that_differ_in_their_rounds_alone(before: str, now: str, found: int | None) -> None:
    assert rounds_before(before, now) == found


RECIPES: Mapping[str, tuple[str, ...]] = {
    "same": (),
    "rounds": ("federation.rounds=9",),
    "other": ("seed=4",),
}


@pytest.mark.parametrize(
    ("recipe_is", "finished", "said"),
    [
        ("same", False, "resume it: flexperts run r --resume"),
        ("same", True, "more rounds: flexperts run r --resume --set federation.rounds=N"),
        ("rounds", True, "give it these rounds: flexperts run r --resume"),
        ("rounds", False, "give it these rounds: flexperts run r --resume"),
        ("other", False, "choose another --out, or delete it"),
        ("other", True, "choose another --out, or delete it"),
    ],
)
def test_a_refusal_offers_what_helps(
    recipe: Recipe, tmp_path: Path, recipe_is: str, finished: bool, said: str
) -> None:
    run = RunDirectory.create(tmp_path / "run", recipe().to_toml())
    if finished:
        run.write_summary({})
    with pytest.raises(ArtifactError, match="it already holds a run") as refused:
        RunDirectory.check_free(run.path, recipe(*RECIPES[recipe_is]).to_toml(), "flexperts run r --resume")
    assert said in refused.value.remedy


def test_a_run_whose_reference_is_not_done_has_not_finished(recipe: Recipe, tmp_path: Path) -> None:
    text = recipe("method.reference=fedavg").to_toml()
    run = RunDirectory.create(tmp_path / "run", text)
    run.write_summary({})
    with pytest.raises(ArtifactError, match="that has not finished; resume it: --resume"):
        RunDirectory.check_free(run.path, text)
    RunDirectory.create(run.reference, text).write_summary({})
    with pytest.raises(ArtifactError, match="that has finished"):
        RunDirectory.check_free(run.path, text)
