"""A finished run is used where its rows are not: by every method, from another place, with its base elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.data import DataConfig
from flexperts.config.run import RunConfig
from flexperts.data.silos.generate import write_silos
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, DataError, FlexpertsError, ModelError
from flexperts.export.exporting import export_run
from flexperts.finished.elsewhere import rows_elsewhere
from flexperts.finished.joining import join
from flexperts.finished.trained import TrainedRun
from flexperts.methods.registry import method_class, method_names
from flexperts.recipe import parse_recipe
from flexperts.serving.engine.lanes import Lanes
from flexperts.testing import METHOD_SETTINGS, save_tiny_base

SHORT = ("evaluation.max_new_tokens=4", "evaluation.rows=2", "training.local_steps=1", "training.lr=0.05")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "silos"
    write_silos(folder, 0, 8, 4)
    return folder


@pytest.fixture(scope="module")
def config(recipe: Callable[..., RunConfig], home: Path) -> RunConfig:
    return recipe(*SHORT).model_copy(update={"data": DataConfig(folder=str(home))})


@pytest.fixture(scope="module")
def workspace(config: RunConfig) -> Workspace:
    return Workspace(config)


def of_method(config: RunConfig, name: str) -> RunConfig:
    return parse_recipe(config.to_toml(), [f"method.name={name}", *METHOD_SETTINGS.get(name, ())])


class NoRows(Workspace):
    """A workspace that must not be asked for rows."""

    @property
    def clients(self) -> Any:  # type: ignore[override]
        raise AssertionError("rows were read")


@pytest.mark.parametrize("name", method_names())
def test_no_method_needs_rows_to_be_used(
    name: str, config: RunConfig, workspace: Workspace, tmp_path: Path
) -> None:
    """Answers without rows are those that the run itself gave with them."""
    out, its = tmp_path / "run", of_method(config, name)
    run_federation(its, out, workspace=workspace)
    run = TrainedRun(out, NoRows(its, workspace.base))
    try:
        client = run.participants[0]
        predicted = RunDirectory(out).of_client("predictions", client)
        for state in method_class(name).states:
            answer = run.generate(client, predicted[0]["instruction"], predicted[0]["context"], state)
            assert answer == predicted[0][state], state
        lanes = Lanes(run)
        for model, lane in lanes.items():
            if model.client == client:
                with lane.opened():
                    pass
    finally:
        run.close()


@pytest.mark.parametrize("name", ["feddpa_t", "feddpa_f", "fdlora"])
def test_what_is_settled_belongs_to_one_model(
    name: str, config: RunConfig, workspace: Workspace, tmp_path: Path
) -> None:
    """Without the file, as in runs of earlier versions, it is made of the rows again."""
    out, its = tmp_path / "run", of_method(config, name)
    run_federation(its, out, workspace=workspace)
    clients = sorted(RunDirectory(out).summary()["clients"])
    kept = {c: out / "personal" / "settled" / f"{c}.safetensors" for c in clients}
    run = TrainedRun(out, workspace)
    answer = run.generate(clients[0], "Say hi.", state="personalized")
    kept[clients[0]].unlink()
    assert run.generate(clients[0], "Say hi.", state="personalized") == answer
    run.close()
    bare = TrainedRun(out, NoRows(its, workspace.base))
    with pytest.raises(AssertionError, match="rows were read"):
        bare.generate(clients[0], "Say hi.", state="personalized")
    assert isinstance(bare.generate(clients[0], "Say hi.", state="global"), str)
    bare.close()


@pytest.fixture(scope="module")
def trained(config: RunConfig, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A finished run that the silo `late` has joined."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run_federation(config, out, workspace=workspace)
    late = home.parent / "late"
    shutil.copytree(home / "shop", late)
    join(out, late / "train.jsonl", test=late / "test.jsonl", steps=1)
    return out


@pytest.fixture
def away(trained: Path, home: Path, tmp_path: Path) -> Any:
    """The run as a copy at another place, while all rows have another name."""
    hidden = home.parent.with_name("hidden")
    home.parent.rename(hidden)
    try:
        yield Path(shutil.copytree(trained, tmp_path / "elsewhere" / "run"))
    finally:
        hidden.rename(home.parent)


def test_a_run_without_its_rows_answers_exports_and_serves(away: Path, tmp_path: Path) -> None:
    run = TrainedRun(away)
    for client in ("clinic", "late"):
        predicted = run.run.of_client("predictions", client)[0]
        answer = run.generate(client, predicted["instruction"], predicted["context"])
        assert answer == predicted["personalized"]
    assert {model.client for model in Lanes(run)} == {*run.participants, "late"}
    with pytest.raises(DataError, match="--data"):
        run.evaluate()
    run.close()
    done = export_run(away, tmp_path / "model", client="late", form="personal", check=False)
    assert done.state == "personalized"


def test_a_base_that_moved_is_named(away: Path, tiny_base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_base, tmp_path / "base")
    text = (away / "config.toml").read_text()
    (away / "config.toml").write_text(text.replace(str(tiny_base), "/nowhere/base"))
    with pytest.raises(ModelError, match="--base"):
        TrainedRun(away)
    run = TrainedRun(away, base=str(moved))
    assert isinstance(run.generate("clinic", "Say hi."), str)
    run.close()
    other = save_tiny_base(tmp_path / "other", seed=1, max_position_embeddings=1024)
    with pytest.raises(ArtifactError, match="belongs to base"):
        TrainedRun(away, base=str(other))
    with pytest.raises(ArtifactError, match="belongs to base"):
        export_run(away, tmp_path / "model", client="clinic", base=str(other), check=False)
    assert not (tmp_path / "model").exists()


def scores(run: TrainedRun, *given: str) -> tuple[dict[str, Any], dict[str, bool]]:
    rows = rows_elsewhere(run, given)
    found = run.evaluate(rows={name: its.rows for name, its in rows.items()})
    nll = {name: {s: its.nll for s, its in states.items()} for name, states in found.items()}
    return nll, {name: its.own for name, its in rows.items()}


def test_rows_from_elsewhere_are_the_runs_own_by_their_hash(away: Path, home: Path, tmp_path: Path) -> None:
    hidden = home.parent.with_name("hidden") / "silos"
    run = TrainedRun(away)
    try:
        nll, own = scores(run, str(hidden))
        assert own == dict.fromkeys(run.participants, True)
        assert nll == {c: run.summary["clients"][c]["nll"] for c in run.participants}
        nll, own = scores(run, f"clinic={hidden}/clinic/test.jsonl", f"late={hidden}/../late/test.jsonl")
        assert own == {"clinic": True, "late": True}
        assert nll == {"clinic": run.summary["clients"]["clinic"]["nll"], "late": run.joined["late"]["nll"]}
        nll, own = scores(run, f"clinic={hidden}/law_firm/test.jsonl")
        assert own == {"clinic": False}
        assert nll["clinic"] != run.summary["clients"]["clinic"]["nll"]
        for given, said in (
            ([f"clinic={hidden}/clinic/train.jsonl"], "was trained on these rows"),
            ([f"nobody={hidden}/clinic/test.jsonl"], "the run's clients are"),
            ([f"clinic={hidden}/clinic/test.jsonl", str(hidden)], "has rows already"),
            ([str(tmp_path / "nothing")], "NAME=FILE"),
            ([f"clinic={tmp_path}/nothing.jsonl"], "no such data file"),
        ):
            with pytest.raises(FlexpertsError, match=said):
                rows_elsewhere(run, given)
    finally:
        run.close()


def test_a_file_that_the_run_has_split_is_split_again(
    recipe: Callable[..., RunConfig], home: Path, workspace: Workspace, tmp_path: Path
) -> None:
    """The tree is moved: by its new place, and by the one file's."""
    tree = shutil.copytree(home, tmp_path / "a" / "b")
    files = {n: {"train": f"{tree}/{f}/train.jsonl"} for n, f in (("ward", "clinic"), ("desk", "shop"))}
    config = workspace.config.model_copy(update={"data": DataConfig(clients=files)})
    out = tmp_path / "run"
    run_federation(config, out, workspace=workspace.for_run(config))
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    run = TrainedRun(out)
    try:
        named = [f"{n}={moved}/b/{f}/train.jsonl" for n, f in (("ward", "clinic"), ("desk", "shop"))]
        for given in ([str(moved)], [str(moved / "b")], named):
            nll, own = scores(run, *given)
            assert own == {"ward": True, "desk": True}
            assert nll == {c: run.summary["clients"][c]["nll"] for c in ("ward", "desk")}
    finally:
        run.close()


def test_an_encoded_row_is_read_when_it_is_looked_at(config: RunConfig, workspace: Workspace) -> None:
    from flexperts.client.workspace import TrainRows

    read: list[int] = []

    def rows() -> Any:
        read.append(1)
        return workspace.examples("clinic")

    lazily = TrainRows(rows)
    assert read == []
    assert list(lazily) == workspace.examples("clinic")
    assert lazily[1:3] == workspace.examples("clinic")[1:3]
    assert len(lazily) == len(workspace.examples("clinic"))
    assert read == [1]
