"""A client joins a finished run: only what is its own trains, and nothing of anybody else's changes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, ConfigError, DataError, FlexpertsError
from flexperts.finished.joining import join, join_left_out
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.turn import Turn
from flexperts.methods.registry import make_method, method_class, method_names
from flexperts.observer import Observer
from flexperts.parameters.store import load_personal
from flexperts.recipe import parse_recipe
from flexperts.testing import METHOD_SETTINGS, save_tiny_base

PAGE = Path(__file__).parents[2] / "docs" / "joining.md"
NEW = {f"{kind}/shop.{end}" for kind, end in (
    ("personal", "safetensors"), ("selection", "json"), ("predictions", "jsonl"), ("joined", "json"),
)}  # fmt: skip
OWN_PARTS = {
    "comigs", "ditto", "fedalt", "feddpa_f", "feddpa_t", "fedper", "fedrep", "fedsa_lora", "flex", "local",
    "local_lora",
    "pfedmoe_style",
}  # fmt: skip
"""Methods whose clients train something that never leaves them."""
TRAINS_WHAT_IS_SENT = {"fedalt"}
"""Of these, those whose newcomer also trains the values that a participant sends; its own stay with it."""
WITHOUT_GLOBAL = {"fedamole", "fedlease", "zero_shot"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def workspace(tiny_base: Path, silos: Path) -> Workspace:
    """Base and rows of the silos that take part."""
    return Workspace(recipe_of(tiny_base, silos))


def recipe_of(base: Path, silos: Path, *overrides: str) -> RunConfig:
    """Two of the silos; `shop` is left out."""
    clients = "\n".join(
        f'[data.clients.{name}]\ntrain = "{silos}/{name}/train.jsonl"\ntest = "{silos}/{name}/test.jsonl"'
        for name in ("clinic", "law_firm")
    )
    return parse_recipe(
        f"""
        [model]
        base = "{base}"
        dtype = "float32"
        precision = "fp32"
        {clients}
        [training]
        max_length = 640
        local_steps = 2
        lr = 0.05
        personal_lr = 0.3
        [federation]
        rounds = 2
        [evaluation]
        max_new_tokens = 2
        rows = 2
        """,
        overrides,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, silos: Path, workspace: Workspace) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    run_federation(recipe_of(tiny_base, silos), out, workspace=workspace)
    return out


@pytest.fixture
def finished(tmp_path: Path, trained: Path, silos: Path) -> Path:
    """A copy of the finished run, with the rows of `shop` beside it."""
    shutil.copytree(silos / "shop", tmp_path / "shop")
    return Path(shutil.copytree(trained, tmp_path / "run"))


def comes(run: Path, workspace: Workspace | None = None, **options: Any) -> dict[str, Any]:
    shop = run.parent / "shop"
    return join(run, shop / "train.jsonl", test=shop / "test.jsonl", workspace=workspace, **options)


def test_only_the_newcomers_files_are_new(finished: Path, workspace: Workspace) -> None:
    before = content(finished)
    record = comes(finished, workspace)
    after = content(finished)
    assert after.keys() - before.keys() == NEW
    assert {n: after[n] for n in before} == before
    assert (record["client"], record["steps"], record["rows"]["train_rows"]) == ("shop", 4, 8)
    assert record["data"] == {"train": "../shop/train.jsonl", "test": "../shop/test.jsonl", "columns": {}}
    assert RunDirectory(finished).joined() == {"shop": json.loads(json.dumps(record))}
    assert str(finished.parent) not in json.dumps(record)


def test_it_is_a_client_like_the_others(finished: Path, workspace: Workspace) -> None:
    record = comes(finished, workspace)
    run = TrainedRun(finished, workspace)
    try:
        assert (run.clients, run.participants) == (["clinic", "law_firm", "shop"], ["clinic", "law_firm"])
        scores = run.evaluate()
        assert {s: its.nll for s, its in scores["shop"].items()} == record["nll"]
        assert {s: its.rouge_l for s, its in scores["shop"].items()} == record["rouge_l"]
        assert len(set(record["nll"].values())) == 3
        assert {c: {s: i.nll for s, i in scores[c].items()} for c in run.participants} == {
            c: run.summary["clients"][c]["nll"] for c in run.participants
        }
        own, others = (run.generate(c, "Summarise the note.") for c in ("shop", "clinic"))
        assert isinstance(own, str)
        assert isinstance(others, str)
        predicted = run.run.of_client("predictions", "shop")
        assert [row["personalized"] for row in predicted] == list(scores["shop"]["personalized"].predictions)
    finally:
        run.close()


def test_what_a_server_has_is_enough(finished: Path, workspace: Workspace) -> None:
    """A deployed run's directory: no rows, no personal states, no path to any."""
    for kept in ("personal", "predictions", "selection"):
        shutil.rmtree(finished / kept)
    recipe = finished / "config.toml"
    text = re.sub(r"\[data\.clients\.\w+\]\n(.*\n)+?\n", "", recipe.read_text()).replace(
        "[data]", "[data]\nat_silos = true"
    )
    recipe.write_text(text.replace("at_silos = false\n", ""))
    assert parse_recipe(recipe.read_text()).data.at_silos
    comes(finished, workspace)
    run = TrainedRun(finished)
    assert isinstance(run.generate("shop", "Summarise the note."), str)
    with pytest.raises(ArtifactError, match=r"clinic\.safetensors"):
        run.generate("clinic", "Summarise the note.")
    run.close()


def test_two_joins_are_equal_and_another_seed_is_not(tmp_path: Path, finished: Path, workspace: Workspace) -> None:
    """Dropout draws from the global stream, whose state must not matter."""
    recipe, results = finished / "config.toml", {}
    text = recipe.read_text()
    assert "[lora]" in text
    recipe.write_text(re.sub(r"(\[lora\][^\[]*dropout = )0\.0", r"\g<1>0.5", text))
    assert recipe.read_text() != text
    for name, seed in (("a", None), ("b", None), ("c", 1)):
        torch.manual_seed(len(results))
        copy = Path(shutil.copytree(finished, tmp_path / name / "run"))
        shutil.copytree(finished.parent / "shop", tmp_path / name / "shop")
        comes(copy, workspace, seed=seed)
        results[name] = content(copy)
    assert results["a"] == results["b"]
    assert results["a"]["personal/shop.safetensors"] != results["c"]["personal/shop.safetensors"]
    assert results["a"]["selection/shop.json"] == results["c"]["selection/shop.json"]


def test_its_own_settings_are_used_and_kept(
    finished: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch, "flex")
    shop = finished.parent / "shop"
    lines = [json.loads(line) for line in (shop / "train.jsonl").read_text().splitlines()]
    (shop / "all.jsonl").write_text("\n".join(json.dumps({"question": r.pop("instruction"), **r}) for r in lines))
    own = ("data.columns.instruction=question", "training.personal_lr=0.01", "training.local_steps=3")
    record = join(finished, shop / "all.jsonl", name="b", settings=own, workspace=workspace)
    assert (record["steps"], record["training"]["personal_lr"]) == (6, 0.01)
    used = seen["settings"]
    assert (used.steps, used.first_step, used.total_steps, used.training.personal_lr) == (6, 0, 6, 0.01)
    assert record["rows"]["train_rows"] + record["rows"]["test_rows"] == 8
    assert record["data"]["columns"] == {"instruction": "question"}
    again = join(finished, shop / "all.jsonl", settings=own[:1], steps=1, workspace=workspace)
    assert (again["client"], again["steps"]) == ("all", 1)
    run = TrainedRun(finished, workspace)
    assert run.client("b").rows == run.client("all").rows
    run.close()


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, Any]:
    """Note what training does to both groups of a method's parameters."""
    kind, seen = method_class(name), {}
    train = kind.personalize

    def copies(turn: Turn) -> tuple[dict[str, Tensor], ...]:
        return tuple(
            {n: p.detach().clone() for n, p in g.items()} for g in (turn.split.shared, turn.split.personal)
        )

    def personalize(self: Any, turn: Turn) -> Any:
        seen["before"], seen["received"], seen["settings"] = copies(turn), turn.received, turn.settings
        result = train(self, turn)
        seen["after"] = copies(turn)
        return result

    monkeypatch.setattr(kind, "personalize", personalize)
    return seen


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {n for n in a if not torch.equal(a[n], b[n])}


VARIANTS = {name: (f"method.name={name}", *METHOD_SETTINGS.get(name, ())) for name in method_names()} | {
    "flex, alternating": ('method.options={phases="alternating", pull=0.1}', "graft.dropout=0.5"),
    "flex, gate from the router": ("graft.gate_start=router",),
    "flex, shared and personal graft": ("graft.sharing=both", "graft.rank=2"),
    "flex, shared graft": ("graft.sharing=shared",),
}
JOINED = OWN_PARTS | {"flex, alternating", "flex, gate from the router", "flex, shared and personal graft"}


def test_the_matrix_holds_every_method() -> None:
    assert len(VARIANTS) > len(method_names()) >= 30
    assert set(method_names()) >= OWN_PARTS | WITHOUT_GLOBAL


@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_takes_a_newcomer_or_refuses_it_by_name(
    tiny_base: Path, silos: Path, tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Shared weights are those that were received, bit for bit, before and after; every personal part learns."""
    small = ("federation.rounds=1", "training.local_steps=1", "evaluation.rows=1", "evaluation.max_new_tokens=1")
    needed = {"fedamole": ("method.options.experts=4",), "fedlease": ("federation.rounds=2",)}.get(name, ())
    shop = silos / "shop"
    left = (
        f'data.clients.shop={{train="{shop}/train.jsonl", test="{shop}/test.jsonl"}}', 'data.leave_out=["shop"]'
    )  # fmt: skip
    config = recipe_of(tiny_base, silos, *small, *left, *VARIANTS[name], *needed)
    run_federation(config, tmp_path / "run", workspace=workspace.for_run(config))
    seen, before = watched(monkeypatch, config.method.name), content(tmp_path / "run")
    common = {"name": "shop", "steps": 2, "workspace": workspace}
    if name not in JOINED:
        usable = "zero_shot" if name in WITHOUT_GLOBAL else "global"
        with pytest.raises(
            ConfigError, match=f"method '{config.method.name}': .*the run's {usable} model as it is"
        ):
            join(tmp_path / "run", shop / "train.jsonl", **common)
        assert content(tmp_path / "run") == before
        uses_what_there_is(tmp_path / "run", config, workspace)
        return
    record = join(tmp_path / "run", shop / "train.jsonl", **common)
    learned = differing(seen["before"][1], seen["after"][1])
    assert learned
    tensors, meta = load_personal(tmp_path / "run" / "personal" / "shop.safetensors")
    if name in TRAINS_WHAT_IS_SENT:
        kept = {n.removeprefix("memory."): t for n, t in tensors.items() if n.startswith("memory.")}
        assert differing(seen["before"][0], seen["after"][0])
        assert differing(seen["after"][0], kept) == set()
    else:
        assert differing(seen["before"][0], seen["after"][0]) == set()
        assert differing(seen["after"][0], dict(seen["received"])) == set()
    assert differing({n: t for n, t in tensors.items() if n in seen["after"][1]}, seen["after"][1]) == set()
    assert meta.shared == record["shared"]
    run = TrainedRun(tmp_path / "run", workspace.for_run(config))
    scores = run.client("shop").evaluate(run.request("shop"), make_method(config.method).states, answers=False)
    assert {state: its.nll for state, its in scores.items()} == record["nll"]
    run.close()


def uses_what_there_is(path: Path, config: RunConfig, workspace: Workspace) -> None:
    """Without a personal part a left-out client has the states of the common model; no file of others changes."""
    method, before = make_method(config.method), content(path)
    record = join_left_out(path, "shop", workspace.for_run(config))
    after = content(path)
    assert {n: after[n] for n in before} == before
    if not method.one_global or method.name in WITHOUT_GLOBAL - {"zero_shot"}:
        assert (record, after) == (None, before)
        return
    assert record
    assert (record["steps"], record["loss"], record["data"]) == (0, None, None)
    assert list(record["nll"]) == [state for state in method.states if state != "personalized"]
    run = TrainedRun(path, workspace.for_run(config))
    scores = run.client("shop").evaluate(run.request("shop"), list(record["nll"]), answers=False)
    assert {state: its.nll for state, its in scores.items()} == record["nll"]
    run.close()


def test_a_newcomers_link_and_bad_rows(finished: Path, workspace: Workspace) -> None:
    """Read again later, its rows are the same: where they lie and what was left out stands in its record."""
    shop = finished.parent / "shop"
    blob = shop / "7f3a"
    blob.write_text((shop / "train.jsonl").read_text() + '{"instruction": "private"}\n')
    (shop / "train.jsonl").unlink()
    (shop / "train.jsonl").symlink_to(blob)
    with pytest.raises(DataError, match=r"shop: .*train.jsonl, line 9, row 9: no response"):
        comes(finished, workspace)
    told: list[str] = []
    observer = Observer()
    observer.notice = told.append  # type: ignore[method-assign]
    record = comes(finished, workspace, settings=["data.on_bad_row=drop"], observer=observer)
    assert (record["client"], record["rows"]["train_rows"]) == ("shop", 8)
    assert record["data"]["train"] == "../shop/train.jsonl"
    assert record["data"]["on_bad_row"] == "drop"
    assert [note for note in told if "left out" in note] == [
        f"shop: {shop / 'train.jsonl'}: "
        "1 of 9 rows are left out (data.on_bad_row = 'drop'): line 9, row 9: no response"
    ]
    run = TrainedRun(finished, workspace)
    try:
        assert len(run.client("shop").rows.train) == 8
    finally:
        run.close()


def test_what_is_refused_changes_nothing(finished: Path, workspace: Workspace, tmp_path: Path) -> None:
    shop = finished.parent / "shop"
    (shop / "one.jsonl").write_text((shop / "train.jsonl").read_text().splitlines()[0])
    (shop / "bad.jsonl").write_text("{")
    before = content(finished)
    refused: list[tuple[type[FlexpertsError], str, Callable[[], Any]]] = [
        (ArtifactError, "client 'clinic': .*--name", lambda: comes(finished, workspace, name="clinic")),
        (DataError, "client '../x'", lambda: comes(finished, workspace, name="../x")),
        (DataError, "1 passages with test_fraction", lambda: join(finished, shop / "one.jsonl")),
        (DataError, "valid JSON", lambda: join(finished, shop / "bad.jsonl")),
        (DataError, "no such data file", lambda: join(finished, shop / "gone.jsonl")),
        (
            DataError,
            "are in train and in test",
            lambda: join(finished, shop / "train.jsonl", test=shop / "train.jsonl"),
        ),
        (ConfigError, "steps = 0", lambda: comes(finished, workspace, steps=0)),
        (ConfigError, "--set lora.rank=2", lambda: comes(finished, workspace, settings=["lora.rank=2"])),
        (ConfigError, "max_length=64", lambda: comes(finished, workspace, settings=["training.max_length=64"])),
        (ConfigError, "training.personal_lr", lambda: comes(finished, settings=["training.personal_lr=-1"])),
    ]
    for kind, message, attempt in refused:
        with pytest.raises(kind, match=message):
            attempt()
        assert content(finished) == before, message
        assert not (finished / "joined").exists()


def test_a_name_that_was_used_is_not_used_again(finished: Path, workspace: Workspace) -> None:
    comes(finished, workspace)
    departed = finished / "personal" / "gone.safetensors"
    departed.write_bytes(b"of a client that was forgotten")
    (finished / "personal" / "clinic.safetensors").unlink()  # as in a run directory from a server
    before = content(finished)
    for name in ("shop", "gone", "clinic"):
        with pytest.raises(ArtifactError, match=f"client '{name}'"):
            comes(finished, workspace, name=name)
    assert content(finished) == before


def test_an_unfinished_run_and_another_base_are_refused(finished: Path, tmp_path: Path) -> None:
    (finished / "summary.json").rename(finished / "kept")
    with pytest.raises(ArtifactError, match="has not finished"):
        comes(finished)
    (finished / "kept").rename(finished / "summary.json")
    other = save_tiny_base(tmp_path / "other", seed=1, max_position_embeddings=1024)
    recipe = finished / "config.toml"
    recipe.write_text(re.sub('base = ".*"', f'base = "{other}"', recipe.read_text()))
    with pytest.raises(ArtifactError, match="the run's own base is needed"):
        comes(finished)
    assert not (finished / "joined").exists()


def test_rows_that_have_changed_are_no_longer_the_newcomers(finished: Path, workspace: Workspace) -> None:
    comes(finished, workspace)
    path = finished.parent / "shop" / "test.jsonl"
    rows = path.read_text()
    path.write_text("\n".join(rows.splitlines()[1:]))
    run = TrainedRun(finished, workspace)
    assert isinstance(run.generate("clinic", "Hello"), str)
    assert isinstance(run.generate("shop", "Hello"), str)
    with pytest.raises(DataError, match=r"shop: test 4 rows before, 3 now: shop joined with other rows"):
        _ = run.client("shop").rows
    path.write_text(rows)
    assert run.client("shop").rows.test
    run.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from flexperts.finished import joining
from flexperts.observer import Observer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Fuse(Observer):
    def progress(self, task, done, total):
        if sys.argv[1] == "training" and ": round" in task and done == 3:
            die()

if sys.argv[1] == "publishing":
    write = joining.write_json
    joining.write_json = lambda path, value: die()
joining.join("run", "shop/train.jsonl", test="shop/test.jsonl", observer=Fuse())
"""


@pytest.mark.faults
@pytest.mark.parametrize("place", ["training", "publishing"])
def test_a_killed_join_leaves_no_client_and_starts_again(
    finished: Path, workspace: Workspace, tmp_path: Path, place: str
) -> None:
    before = content(finished)
    undisturbed = tmp_path / "other"
    shutil.copytree(finished.parent / "shop", undisturbed / "shop")
    shutil.copytree(finished, undisturbed / "run")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, place],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = content(finished)
    assert {n: left[n] for n in before} == before
    assert RunDirectory(finished).joined() == {}
    assert left.keys() - before.keys()
    trained = TrainedRun(finished, workspace)
    assert trained.clients == trained.participants
    trained.close()
    for run in (finished, undisturbed / "run"):
        shop = run.parent / "shop"  # with other rows, so that nothing of the killed one may be taken up
        join(run, shop / "test.jsonl", test=shop / "train.jsonl", name="shop", workspace=workspace)
    assert content(finished) == content(undisturbed / "run")


def test_the_pages_example_works(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs/first")
    shutil.copytree(finished.parent / "shop", "oncology")
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    assert len(block[1].splitlines()) <= 10
    exec(compile(block[1], str(PAGE), "exec"), {})
    assert RunDirectory(Path("runs/first")).joined().keys() == {"oncology"}
