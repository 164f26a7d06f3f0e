"""What trackers get of a run: its recipe and every round's numbers, once, and nothing else."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from flexperts import tracking
from flexperts.cli.main import main
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.files import placeless
from flexperts.observer import Observer, Observers
from flexperts.recipe import parse_recipe
from flexperts.tracking import Tracking, hyperparameters, scalars, tracker_names

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
Curves = dict[str, dict[int, float]]
CLIENTS = ["clinic", "help_desk", "law_firm", "shop"]
SHORT = ("evaluation.max_new_tokens=2", "evaluation.rows=2", "evaluation.answers='last'", "evaluation.every=1")


class BrokenOffError(Exception):
    """What stands for a power cut."""


class AfterRound(Observer):
    """Breaks the run off when a round is finished, written down and tracked."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round(self, record: Mapping[str, Any]) -> None:
        if record["number"] == self.number:
            raise BrokenOffError


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def curves(folder: Path) -> Curves:
    """Return tag -> step -> value of a folder's event files; a step that stands there twice fails."""
    events = read(folder)
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(dict(points)) == len(points) for points in found.values())
    return {tag: dict(points) for tag, points in found.items()}


def expected(run: Path) -> Curves:
    """Return the same of rounds.jsonl, tag by tag and by hand; TensorBoard stores single precision."""
    found: Curves = {}
    for line in (run / "rounds.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = {f"seconds/{phase}": record["seconds"][phase] for phase in ("training", "evaluation")}
        for direction, tag in (("uplink", "bytes_up"), ("downlink", "bytes_down")):
            values |= {f"{tag}/clients/{c}": record[direction][c] for c in CLIENTS}
            values[f"{tag}/total"] = sum(record[direction][c] for c in CLIENTS)
        values |= {f"loss/clients/{c}": record["clients"][c]["loss"] for c in CLIENTS}
        values["loss/mean"] = np.mean([record["clients"][c]["loss"] for c in CLIENTS])
        for key in sorted(record["scores"]["shop"].keys() - {"rows"}):
            tag = key.replace(".", "/")
            values |= {f"{tag}/clients/{c}": record["scores"][c][key] for c in CLIENTS}
            values[f"{tag}/mean"] = np.mean([record["scores"][c][key] for c in CLIENTS])
        for tag, value in values.items():
            found.setdefault(tag, {})[record["number"]] = float(np.float32(value))
    return found


def hparams(folder: Path) -> list[dict[str, Any]]:
    """Return the hyperparameters of every start, as TensorBoard's own plugin reads them."""
    starts = []
    for start in sorted(p.parent for p in folder.glob("*/events.*")):
        metadata = read(start).SummaryMetadata("_hparams_/session_start_info")
        info = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info
        starts.append({k: getattr(v, v.WhichOneof("kind")) for k, v in info.hparams.items()})
    return starts


def test_tensorboard_holds_every_number_of_every_round_and_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    out, config = tmp_path / "run", recipe(*SHORT, "method.reference=fedavg")
    with Tracking(["tensorboard"], config, out) as tracked:
        run_federation(config, out, tracked)
    for run, name in ((out, "flex"), (out / "reference", "reference/fedavg")):
        folder = out / "tensorboard" / name
        found = curves(folder)
        assert found["loss/mean"].keys() == {1, 2}
        assert found["rouge_l/zero_shot/clients/shop"].keys() == {2}  # answers in the last round only
        assert found["nll/global/mean"].keys() == {1, 2}
        ours = expected(run)
        assert found.keys() == ours.keys()
        for tag in ours:
            assert found[tag] == pytest.approx(ours[tag], rel=1e-6), tag
        (settings,) = hparams(folder)
        assert settings["run"] == f"run/{name}"
        assert settings["method.name"] == name.removeprefix("reference/")
        assert settings["training.max_length"] == 640
        assert settings["lora.projections"] == "q_proj, k_proj, v_proj"
        assert settings["model.base"] == "tiny"  # not where it lies
        assert ("method.reference" in settings) == (name == "flex")
        (file,) = folder.glob("*/hparams.yml")
        assert yaml.safe_load(file.read_text()) == {"run": f"run/{name}", **hyperparameters_of(run)}
    states = {tag.split("/")[1] for tag in curves(out / "tensorboard" / "flex") if tag.startswith("nll")}
    assert states == {"zero_shot", "global", "personalized"}


def hyperparameters_of(run: Path) -> dict[str, Any]:
    return hyperparameters(parse_recipe((run / "config.toml").read_text()))


def test_of_a_path_only_the_last_name_is_told_in_lists_too() -> None:
    assert placeless({"a": ["/home/ada/rows.jsonl", 1], "b": "/x/y", "c": "x/y"}) == {
        "a": ["rows.jsonl", 1],
        "b": "y",
        "c": "x/y",
    }


@pytest.mark.parametrize("reference", [False, True], ids=["in the method", "in the reference"])
def test_a_resumed_run_tracks_each_round_once(recipe: Recipe, tmp_path: Path, reference: bool) -> None:
    out, config = tmp_path / "run", recipe(*SHORT, "method.name=fedavg", "method.reference=fedavg")

    class InReference(AfterRound):
        def round(self, record: Mapping[str, Any]) -> None:
            if (out / "reference").exists() == reference:
                super().round(record)

    with pytest.raises(BrokenOffError), Tracking(["tensorboard"], config, out) as tracked:
        run_federation(config, out, Observers(tracked, InReference(1)))
    broken = "reference/fedavg" if reference else "fedavg"
    assert curves(out / "tensorboard" / broken)["loss/mean"].keys() == {1}
    for _ in range(2):  # a finished one is not tracked again
        with Tracking(["tensorboard"], config, out) as tracked:
            run_federation(config, out, tracked, resume=True)
        for run, name in ((out, "fedavg"), (out / "reference", "reference/fedavg")):
            found, ours = curves(out / "tensorboard" / name), expected(run)
            assert found.keys() == ours.keys()
            assert all(found[tag] == pytest.approx(ours[tag], rel=1e-6) for tag in ours)
            assert len(hparams(out / "tensorboard" / name)) == 1 + (name == broken)


class Notebook(GeneralTracker):
    """Remembers its calls; what it stands for has a project and no directory."""

    name = "notebook"
    requires_logging_directory = False
    calls: list[tuple[str, Any]]
    fails = False

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.calls.append(("new", run_name))

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        if self.fails:
            raise OSError("no key")
        self.calls.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("settings", values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    """A tracker that is registered with accelerate, as a user's own may be."""
    monkeypatch.setattr(Notebook, "calls", [], raising=False)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    return Notebook


RECORD = {
    "number": 3,
    "clients": {"a": {"loss": 1.0, "steps": 2}, "b": {"loss": 4.0, "steps": 2}},
    "uplink": {"a": 10, "b": 20},
    "downlink": {"a": 1, "b": 2},
    "scores": {"a": {"nll.global": 2.0, "rows": 4}, "b": {"nll.global": 3.0, "rows": 40}},
    "seconds": {"training": 0.5, "evaluation": 0.25},
}
TAGS = {
    "loss/clients/a": 1.0,
    "loss/clients/b": 4.0,
    "loss/mean": 2.5,
    "nll/global/clients/a": 2.0,
    "nll/global/clients/b": 3.0,
    "nll/global/mean": 2.5,
    "bytes_up/clients/a": 10,
    "bytes_up/clients/b": 20,
    "bytes_up/total": 30,
    "bytes_down/clients/a": 1,
    "bytes_down/clients/b": 2,
    "bytes_down/total": 3,
    "seconds/training": 0.5,
    "seconds/evaluation": 0.25,
}


def test_a_tracker_is_started_once_fed_in_order_and_finished(
    recipe: Recipe, tmp_path: Path, notebook: type[Notebook]
) -> None:
    config = recipe("method.reference=fedavg")
    with Tracking(["notebook", "notebook"], config, tmp_path / "out") as tracked:
        assert notebook.calls == []  # nothing before rows and base are checked
        tracked.split("flex", [])
        tracked.round(RECORD)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "summary.json").touch()
        tracked.split("fedavg", [])
        tracked.round(RECORD | {"number": 1})
    settings = [{"run": "out/flex", **hyperparameters(config)}]
    settings += [{"run": "out/reference/fedavg", **hyperparameters(config.with_method("fedavg"))}]
    assert notebook.calls == [
        call
        for number, setting in zip((3, 1), settings, strict=True)
        for call in [
            ("new", "flexperts"),
            ("start", None),
            ("settings", setting),
            ("log", (number, TAGS)),
            ("finish", None),
        ]
    ]


def test_trackers_are_finished_when_the_run_breaks_off(
    recipe: Recipe, tmp_path: Path, notebook: type[Notebook]
) -> None:
    def broken() -> None:
        with Tracking(["notebook"], recipe(), tmp_path) as tracked:
            tracked.split("flex", [])
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        broken()
    assert [what for what, _ in notebook.calls] == ["new", "start", "settings", "finish"]


def test_a_tracker_that_cannot_start_is_an_error_in_one_line(
    recipe: Recipe, tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "fails", True)
    with (
        pytest.raises(ConfigError, match="tracker 'notebook': it cannot start"),
        Tracking(["notebook"], recipe(), tmp_path) as tracked,
    ):
        tracked.split("flex", [])
    assert notebook.calls == [("new", "flexperts")]


def test_a_round_in_which_nobody_trains_or_is_scored() -> None:
    record = RECORD | {"clients": {}, "uplink": {}, "downlink": {}, "scores": {}}
    seconds = {"seconds/training": 0.5, "seconds/evaluation": 0.25}
    assert scalars(record) == {"bytes_up/total": 0, "bytes_down/total": 0, **seconds}


def test_a_client_may_have_any_name() -> None:
    """Names such as these would fall on the tags of means and totals if clients had no level of their own."""
    sizes = {"total": 1, "mean": 2}
    tags = scalars(RECORD | {"uplink": sizes, "clients": {name: {"loss": n} for name, n in sizes.items()}})
    assert [tags[f"bytes_up/{name}"] for name in ("total", "clients/total", "clients/mean")] == [3, 1, 2]
    assert [tags[f"loss/{name}"] for name in ("mean", "clients/total", "clients/mean")] == [1.5, 1, 2]


def test_settings_tell_the_names_of_files_and_not_where_they_lie() -> None:
    text = """
        [data.clients.bank]
        train = "/home/somebody/secret-project/rows.jsonl"
        test = "hub:org/name"
    """
    settings = hyperparameters(parse_recipe(text))
    assert settings["data.clients.bank.train"] == "rows.jsonl"
    assert settings["data.clients.bank.test"] == "hub:org/name"
    assert not [value for value in settings.values() if "somebody" in str(value)]
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())


def test_unknown_trackers_are_refused_with_those_that_are_known(recipe: Recipe, tmp_path: Path) -> None:
    assert {"aim", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"} <= set(tracker_names())
    for name in ("tensorbord", "all", "dvclive"):
        with pytest.raises(ConfigError, match=f"tracker '{name}': there is no such tracker; known: .*tensorboard"):
            Tracking([name], recipe(), tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("tensorboard", "run pip install 'flexperts[tensorboard]'"), ("comet_ml", "run pip install comet_ml")],
)
def test_missing_packages_are_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError) as caught:
        Tracking([name], recipe(), tmp_path)
    assert (caught.value.value, caught.value.remedy) == (f"tracker '{name}'", remedy)


def test_two_observers_get_every_event_in_order() -> None:
    """Every event that an observer has, those of later days included."""
    seen: list[tuple[Any, ...]] = []
    events = {n: f for n, f in vars(Observer).items() if inspect.isfunction(f)}

    def recording(number: int, name: str) -> Callable[..., None]:
        return lambda self, *arguments: seen.append((number, name, *arguments))

    first, second = (type("Seen", (Observer,), {n: recording(i, n) for n in events})() for i in (1, 2))
    both = Observers(first, second)
    expected = []
    for name, function in events.items():
        arguments = [object() for _ in list(inspect.signature(function).parameters)[1:]]
        getattr(both, name)(*arguments)
        expected += [(1, name, *arguments), (2, name, *arguments)]
    assert seen == expected
    assert {"stage", "progress", "split", "chosen", "round"} <= events.keys()


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["flexperts", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


def test_the_command_tracks_and_shows(recipe: Recipe, tmp_path: Path, notebook: type[Notebook]) -> None:
    file, out = tmp_path / "recipe.toml", tmp_path / "out"
    file.write_text(recipe("method.name=fedavg", *SHORT).to_toml())
    code, printed, said = call("run", file, "--out", out, "--track", "tensorboard", "--track", "notebook")
    assert (code, said) == (0, "")
    assert "round 2 of 2" in printed
    found, ours = curves(out / "tensorboard" / "fedavg"), expected(out)
    assert found.keys() == ours.keys()
    assert all(found[tag] == pytest.approx(ours[tag], rel=1e-6) for tag in ours)
    assert [what for what, _ in notebook.calls] == ["new", "start", "settings", "log", "log", "finish"]
    code, printed, said = call("run", file, "--out", tmp_path / "other", "--track", "tensorbord")
    assert (code, printed) == (2, "")  # said before anything is loaded
    assert said.startswith("error: tracker 'tensorbord': there is no such tracker; known: ")
    assert not (tmp_path / "other").exists()


def test_without_the_option_nothing_is_tracked(recipe: Recipe, tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.toml", tmp_path / "out"
    file.write_text(recipe("method.name=fedavg", *SHORT).to_toml())
    assert call("run", file, "--out", out)[0] == 0
    assert not list(out.rglob("*events*"))
