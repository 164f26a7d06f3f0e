"""Running a comparison: nothing twice, nothing of another recipe, nobody's failure at another's cost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flexperts.artifacts import RunDirectory
from flexperts.client.client import Client
from flexperts.client.states import in_states
from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, load_clients
from flexperts.errors import ArtifactError, ConfigError, FlexpertsError
from flexperts.evaluation.scores import evaluate
from flexperts.files import read_json, write_json
from flexperts.methods.kit.turn import Turn
from flexperts.observer import Observer
from flexperts.recipe import load_recipe
from flexperts.studies import runner
from flexperts.studies.claim import alone_in, claimed
from flexperts.studies.collect import collect_comparison
from flexperts.studies.entries import ComparisonPlan, plan_comparison
from flexperts.studies.finished import DONE
from flexperts.studies.runner import HEAVY, Job, jobs, run_comparison

Planned = Callable[..., ComparisonPlan]
Runs = list[tuple[str, int]]
ENTRIES = ["fedavg", "flex", "local", "zero_shot", "k2"]
SOME: Runs = [("flex", 0), ("local", 0), ("k2", 0), ("fedavg", 1)]
"""Runs that tests take away, in the order in which they are run again."""


def without_measured(value: Any) -> Any:
    """Return a comparison without what no two runs have in common: seconds and memory."""
    if isinstance(value, dict):
        return {k: without_measured(v) for k, v in value.items() if k not in ("seconds", "peak_memory")}
    return [without_measured(v) for v in value] if isinstance(value, list) else value


@pytest.fixture
def started(compared: Path, tmp_path: Path) -> Path:
    """The comparison as it stands when four of its ten runs have not begun."""
    out = shutil.copytree(compared, tmp_path / "started")
    for entry, seed in SOME:
        shutil.rmtree(out / "runs" / entry / f"seed-{seed}")
    return out


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Let runs be noted instead of run."""
    noted: Runs = []

    def note(config: RunConfig, folder: Path, *_: object, **__: object) -> None:
        noted.append((folder.parent.name, config.seed))

    monkeypatch.setattr(runner, "run_federation", note)
    return noted


def test_a_finished_comparison_runs_nothing(plan: Planned, compared: Path, tmp_path: Path, ran: Runs) -> None:
    out = shutil.copytree(compared, tmp_path / "whole")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run_comparison(plan(), out) == []
    assert ran == []
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_is_missing_is_run_in_order_and_only_that(plan: Planned, started: Path, ran: Runs) -> None:
    seen: list[tuple[str, int, str | None]] = []
    run_comparison(plan(), started, on_done=lambda job, error: seen.append((job.entry.name, job.seed, error)))
    assert ran == SOME
    assert seen == [(*run, None) for run in SOME]


def test_seeds_and_entries_can_be_added(plan: Planned, compared: Path, tmp_path: Path, ran: Runs) -> None:
    out = shutil.copytree(compared, tmp_path / "more")
    run_comparison(plan(seeds=3), out)
    assert ran == [(name, 2) for name in ENTRIES]
    ran.clear()
    run_comparison(plan(entries=["flex", "fedprox"], seeds=2), out)
    assert ran == [("fedprox", 0), ("fedprox", 1)]
    assert list(read_json(out / "compare.json")["entries"]) == [*ENTRIES, "fedprox"]


def test_processes_that_start_at_once_lose_nothing_of_each_other(plan: Planned, tmp_path: Path, ran: Runs) -> None:
    """Each writes the claim that all share, with its own entry in it."""
    names = ["flex", "fedavg", "local", "fedprox", "fedsa_lora", "zero_shot"] * 4
    plans = [plan(entries=[name], seeds=1) for name in names]
    with ThreadPoolExecutor(len(plans)) as pool:
        list(pool.map(lambda each: run_comparison(each, tmp_path / "new"), plans))
    assert set(read_json(tmp_path / "new" / "compare.json")["entries"]) == set(names)


@pytest.mark.parametrize("setting", ["training.lr=0.5", "data.validation_fraction=0.2", "federation.rounds=3"])
def test_another_recipes_directory_is_refused(
    plan: Planned, compared: Path, tmp_path: Path, ran: Runs, setting: str
) -> None:
    out = shutil.copytree(compared, tmp_path / "other")
    claim = (out / "compare.json").read_text()
    key, _, value = setting.partition("=")
    with pytest.raises(ArtifactError, match=rf"another recipe \({key}: .*, now {value}\)"):
        run_comparison(plan(setting, seeds=3), out)
    assert ran == []
    assert (out / "compare.json").read_text() == claim


@pytest.mark.parametrize("written", ['output = "expert"\n', ""], ids=["has the settings", "had no such settings"])
def test_a_comparison_goes_on_with_what_it_left_open_when_it_began(
    plan: Planned, compared: Path, tmp_path: Path, ran: Runs, written: str
) -> None:
    """One of a version whose FLEx was the paper's; what the recipe sets is another one's all the same."""
    out = shutil.copytree(compared, tmp_path / "older")
    claim = read_json(out / "compare.json")
    recipe = claim["recipe"].replace('output = "auto"\n', written)
    moments = 'personal_moments = "fresh"\n' if written else ""
    recipe = recipe.replace('personal_moments = "auto"\n', moments)
    assert not {'output = "auto"', 'personal_moments = "auto"'} & {*recipe.splitlines()}
    write_json(out / "compare.json", claim | {"recipe": recipe})
    used: list[RunConfig] = []
    make, planned = ComparisonPlan.config, plan(seeds=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComparisonPlan, "config", lambda *its: used.append(make(*its)) or used[-1])
        assert run_comparison(planned, out) == []
    assert {(c.graft.output, c.training.personal_moments) for c in used} == {("expert", "fresh")}
    with pytest.raises(ArtifactError, match=r"graft\.output: 'expert', now 'difference'"):
        run_comparison(plan("graft.output=difference", seeds=3), out)


@pytest.mark.parametrize("start", ["begun", "pinned"])
def test_an_entry_goes_on_as_it_began_where_the_recipe_sets_what_it_leaves_open(
    plan: Planned, tmp_path: Path, ran: Runs, start: str
) -> None:
    """Else its later seeds would be another method under its name."""
    pins = ("graft.output=expert", "training.personal_moments=fresh") if start == "pinned" else ()
    auto = '"graft.output=auto", "training.personal_moments=auto"'
    variants = f'compare.variants={{open = [{auto}], section = ["graft={{experts=2}}"], silent = []}}'
    used: list[RunConfig] = []
    make = ComparisonPlan.config
    planned = plan(*pins, variants, entries=["open", "section", "silent"], seeds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComparisonPlan, "config", lambda *its: used.append(make(*its)) or used[-1])
        for _ in range(2):
            assert run_comparison(planned, tmp_path / "out") == []
            for job in jobs(planned, tmp_path / "out"):
                (job.folder / DONE).unlink()
    first, again = used[: len(used) // 2], used[len(used) // 2 :]
    assert first == again
    resolved = {(c.graft.output, c.training.personal_moments) for c in first if c.graft.experts == 1}
    assert resolved == {("auto", "auto"), *([("expert", "fresh")] if pins else [])}


def test_an_entry_that_leaves_it_open_itself_is_not_what_an_older_comparison_began_with(
    plan: Planned, tmp_path: Path, ran: Runs
) -> None:
    """The claim of a version whose default was the paper's, and one whose template got a date."""
    planned = plan('compare.variants.open=["graft.output=auto"]', entries=["open", "flex"], seeds=1)
    begun = load_recipe(planned.recipe, ("graft.output=expert", 'model.template_date="2026-02-03"'))
    opened, flex = (planned.as_begun(begun).config(entry, 0) for entry in planned.entries)
    assert (opened.graft.output, flex.graft.output) == ("auto", "expert")
    assert {opened.model.template_date, flex.model.template_date} == {"2026-02-03"}


@pytest.mark.parametrize(
    ("setting", "count"),
    [
        ("evaluation.rows=3", 9),
        ("evaluation.split=validation", 10),
        ("evaluation.clients=2", None),
        ('data.leave_out=["farm"]', 7),
        ("data.folder=others", 13),
    ],
)
def test_an_entry_on_other_rows_is_refused_before_anything_is_trained(
    plan: Planned, work: Path, tmp_path: Path, ran: Runs, setting: str, count: int | None
) -> None:
    """Else all of it would be trained, and no report be written."""
    others = tmp_path / "others"
    shutil.copytree(work / "clients", others)
    (others / "farm" / "test.jsonl").write_text(
        (others / "farm" / "test.jsonl").read_text().replace("farm", "barn")
    )
    variants = f"compare.variants.odd={json.dumps([setting.replace('others', str(others))])}"
    with pytest.raises(ConfigError, match="must be scored on the same rows") as caught:
        run_comparison(plan(variants, entries=["fedavg", "odd"]), tmp_path / "out")
    said = str(caught.value)
    assert "entry 'odd' with" in said
    assert f"seed 0: {count} scored rows" in said or count is None
    assert "not the 13 of 'fedavg'" in said
    assert "another --out" in said
    assert "barn" not in said
    assert "farm test" not in said
    assert (ran, (tmp_path / "out").exists()) == ([], False)


def test_an_entry_on_other_rows_than_a_directorys_reference_is_refused(
    plan: Planned, compared: Path, tmp_path: Path, ran: Runs
) -> None:
    out = shutil.copytree(compared, tmp_path / "more")
    claim = (out / "compare.json").read_text()
    with pytest.raises(ConfigError, match=r"entry 'odd' with .* of 'flex'"):
        run_comparison(plan('compare.variants.odd=["evaluation.rows=3"]', entries=["odd"]), out)
    assert (ran, (out / "compare.json").read_text()) == ([], claim)


def test_other_settings_that_leave_the_scored_rows_as_they_are_are_allowed(
    plan: Planned, tmp_path: Path, ran: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read once for the same settings, and not at all where no setting of theirs differs."""
    read: list[Any] = []

    def noted(*its: Any) -> Clients:
        read.append(its)
        return load_clients(*its)

    monkeypatch.setattr("flexperts.studies.scored.load_clients", noted)
    variants = 'compare.variants={less = ["data.validation_fraction=0.4"], all = ["evaluation.rows=6"], k2 = []}'
    variants = variants.replace("all =", "six =")
    assert run_comparison(plan(variants, entries=["flex", "k2", "fedavg"]), tmp_path / "same") == []
    assert read == []
    assert run_comparison(plan(variants, entries=["flex", "less", "k2", "six"]), tmp_path / "out") == []
    assert sorted(seed for _, seed in read) == [0, 0, 0, 1, 1, 1]


def test_rows_that_an_entry_would_drop_are_missing_from_its_scored_rows(
    plan: Planned, work: Path, tmp_path: Path, ran: Runs
) -> None:
    folder = tmp_path / "clients"
    shutil.copytree(work / "clients", folder)
    with (folder / "farm" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "long" * 33, "response": "e"}) + "\n")
    settings = f"data.folder={folder}", "data.on_bad_row=drop", "training.max_length=250"
    variants = 'compare.variants.short=["training.max_length=128"]'
    with pytest.raises(ConfigError, match=r"seed 0: 13 scored rows: .* not the 14 of 'flex'"):
        run_comparison(plan(*settings, variants, entries=["flex", "short"]), tmp_path / "out")


def test_a_variant_that_changed_is_not_taken_for_what_was_run(
    plan: Planned, compared: Path, tmp_path: Path, ran: Runs
) -> None:
    """Its finished runs would stand in the table under settings that they never had."""
    out = shutil.copytree(compared, tmp_path / "changed")
    with pytest.raises(ArtifactError, match=r"entry 'k2' with .*experts=3.*run with .*experts=2"):
        run_comparison(plan('compare.variants.k2=["graft.experts=3"]'), out)
    assert ran == []
    shutil.rmtree(out / "runs" / "k2")
    run_comparison(plan('compare.variants.k2=["graft.experts=3"]'), out)
    assert ran == [("k2", 0), ("k2", 1)]


def test_a_directory_keeps_its_reference(plan: Planned, tmp_path: Path, ran: Runs) -> None:
    def reference(*entries: str, **arguments: Any) -> str:
        run_comparison(plan(entries=entries, **arguments), tmp_path / "out")
        return str(read_json(tmp_path / "out" / "compare.json")["reference"])

    assert reference("local", "fedavg") == "local"  # the recipe's, flex, is not there
    assert reference("flex") == "local"
    assert reference("fedprox", reference="flex") == "flex"
    assert reference("local") == "flex"
    with pytest.raises(ConfigError, match="reference 'ditto': it must be one of local, fedavg, flex, fedprox"):
        reference("local", reference="ditto")


def test_the_reference_stands_while_it_has_no_finished_run(plan: Planned, tmp_path: Path) -> None:
    """Another process with other entries, or a start after a kill, does not change what is compared with what."""
    out = tmp_path / "out"
    for entries in (["local", "flex"], ["fedavg"], ["local", "fedavg"]):
        with alone_in(out):
            claim = claimed(plan(entries=entries), out)
            write_json(out / "compare.json", claim)
        assert claim["reference"] == "flex"


def test_the_recipes_reference_stands_where_it_is_an_entry(plan: Planned, tmp_path: Path, ran: Runs) -> None:
    run_comparison(plan(entries=["local", "flex"]), tmp_path / "out")
    assert read_json(tmp_path / "out" / "compare.json")["reference"] == "flex"


@pytest.mark.parametrize("outcome", ["finished", "died"])
def test_a_run_that_another_process_has_in_hand_is_waited_for_at_the_end(
    plan: Planned, tmp_path: Path, ran: Runs, outcome: str
) -> None:
    """Finished there, it is not run again here; where that process died, it is."""
    wanted, out = plan(entries=["fedavg", "flex"], seeds=1), tmp_path / "out"
    seen: list[Any] = []
    busy = jobs(wanted, out)[0]
    busy.folder.mkdir(parents=True)
    lock = FileLock(busy.folder.with_name("seed-0.lock"), thread_local=False)

    class Told(Observer):
        def stage(self, text: str) -> None:
            if "runs of another process: fedavg, seed 0" in text:
                seen.append("waiting")
                if outcome == "finished":
                    (busy.folder / DONE).touch()
                lock.release()

    lock.acquire()
    failed = run_comparison(
        wanted, out, observer=Told(), on_done=lambda job, error: seen.append((job.entry.name, error))
    )
    assert failed == []
    assert seen == [("flex", None), "waiting", ("fedavg", None)]
    assert ran == [("flex", 0), *([("fedavg", 0)] if outcome == "died" else [])]


def test_a_broken_first_entry_does_not_break_the_next(plan: Planned, tmp_path: Path) -> None:
    """Each run is checked by its own settings, though they share rows and base."""
    variants = 'compare.variants={big = ["graft.experts=99"]}'
    failed = run_comparison(plan(variants, entries=["big", "fedavg"], seeds=1), tmp_path / "out")
    assert [job.entry.name for job in failed] == ["big"]
    assert "graft.experts = 99" in (failed[0].folder / "error.txt").read_text()


def test_a_reference_that_has_not_run_is_refused(plan: Planned, tmp_path: Path, ran: Runs) -> None:
    with pytest.raises(ConfigError, match="reference 'local': it must be one of fedavg"):
        run_comparison(plan(entries=["fedavg"], reference="local"), tmp_path / "out")
    assert ran == []
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "compare.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"compare\.json"):
        run_comparison(plan(entries=["fedavg"]), tmp_path / "out")


def test_two_entries_do_not_share_a_folder(plan: Planned, tmp_path: Path, ran: Runs) -> None:
    """Else the second one would find its runs done."""
    variants = 'compare.variants={"k 2" = ["graft.experts=2"], "k_2" = ["graft.experts=1"]}'
    with pytest.raises(ArtifactError, match="'k 2' and 'k_2'"):
        run_comparison(plan(variants, entries=["k 2", "k_2"], reference="k 2"), tmp_path / "out")
    assert ran == []


def test_weights_are_removed(compared: Path) -> None:
    runs = [path.parent for path in (compared / "runs").glob("*/*/done")]
    assert len(runs) == 10
    assert not [run / name for run in runs for name in HEAVY if (run / name).exists()]
    assert not list(compared.rglob("*.safetensors"))


def test_a_failing_entry_costs_no_other(
    plan: Planned, started: Path, comparison: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """flex breaks in the middle of its first round with its grafts on the base that later entries run on."""
    keep = Client._keep

    def broken(client: Client, turn: Turn, *rest: Any) -> None:
        if client.method.name == "flex" and client.config.graft.experts == 1 and client.name == "cafe":
            raise RuntimeError("out of luck")
        keep(client, turn, *rest)

    told: list[tuple[str, str | None]] = []

    def tell(job: Job, error: str | None) -> None:
        told.append((job.entry.name, error))

    with monkeypatch.context() as patch:
        patch.setattr(Client, "_keep", broken)
        (failed,) = run_comparison(plan(), started, on_done=tell)
    assert (failed.entry.name, failed.seed, failed.done) == ("flex", 0, False)
    assert [name for name, _ in told] == [name for name, _ in SOME]
    assert [error is None for _, error in told] == [False, True, True, True]
    assert "out of luck" in str(told[0][1])
    text = (failed.folder / "error.txt").read_text()
    assert text.startswith("Traceback")
    assert "out of luck" in text
    # taken up again, this time with its weights kept, it is what an unbroken comparison is
    assert run_comparison(plan(), started, keep_weights=True) == []
    assert not (failed.folder / "error.txt").exists()
    assert sorted(name for name in HEAVY if (failed.folder / name).exists()) == sorted(HEAVY)
    assert without_measured(collect_comparison(started)) == without_measured(comparison) | {"title": "started"}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_run_is_tracked_by_its_own_name(plan: Planned, tmp_path: Path, workers: int) -> None:
    assert (
        run_comparison(plan(entries=["k2", "local"], seeds=1), tmp_path, workers=workers, track=["tensorboard"])
        == []
    )
    for name, method in (("k2", "flex"), ("local", "local")):
        folder = tmp_path / "runs" / name / "seed-0" / "tensorboard" / method
        events = EventAccumulator(str(folder)).Reload()
        assert [point.step for point in events.Scalars("loss/mean")] == [1, 2]
        (settings,) = folder.glob("*/hparams.yml")
        assert f"run: {name}, seed 0/{method}" in settings.read_text()


def test_an_unknown_tracker_is_refused_before_anything_is_written(plan: Planned, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tracker 'tensorbord'"):
        run_comparison(plan(), tmp_path / "out", track=["tensorbord"])
    assert not (tmp_path / "out").exists()


def test_an_error_of_ours_is_told_as_it_is(plan: Planned, started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FlexpertsError("value", "rule", "remedy")

    monkeypatch.setattr(runner, "run_federation", refuse)
    told: list[str | None] = []
    failed = run_comparison(plan(), started, on_done=lambda job, error: told.append(error))
    assert [(job.entry.name, job.seed) for job in failed] == SOME
    assert set(told) == {str(FlexpertsError("value", "rule", "remedy"))}


def test_the_untouched_base_is_scored_once_for_all_entries_and_seeds(
    plan: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three clients' own rows and the general tasks; routing looks at the base by itself, once a client."""
    states: list[str] = []
    entered: list[str] = []

    @contextmanager
    def watched(*whose: Any) -> Iterator[Any]:
        with in_states(*whose) as enter:
            yield lambda state: entered.append(state) or enter(state)

    def count(*what: Any) -> Any:
        states.append(entered[-1])
        return evaluate(*what)

    monkeypatch.setattr(runner, "_workspace", None)
    monkeypatch.setattr("flexperts.client.client.in_states", watched)
    monkeypatch.setattr("flexperts.client.client.evaluate", count)
    small = plan("federation.rounds=1", "training.local_steps=1", entries=["flex", "fedavg"])
    assert run_comparison(small, tmp_path / "out") == []
    assert states.count("zero_shot") == 3 + 1
    # every run: own rows of 3 clients and the general tasks (the global model's once, a personalized one's each)
    assert states.count("global") == 4 * (3 + 1)
    # flex: own rows, others' rows (2 each), general tasks
    assert states.count("personalized") == 2 * (3 + 6 + 3)


def test_a_base_that_is_kept_is_scored_anew_where_contexts_are_cut_elsewhere(
    plan: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaking_base: Path
) -> None:
    """A shorter training.max_length cuts the prompts: the untouched base's old scores are of other prompts."""
    row = {"instruction": "what?", "context": "e t a o i n " * 8, "response": "e t"}
    for side, count in (("train", 4), ("test", 2)):
        lines = [json.dumps(row | {"context": f"{side} {i} {row['context']}"}) for i in range(count)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(lines))
    recipe = f"""
        [model]
        base = "{speaking_base}"
        dtype = "float32"
        precision = "fp32"
        [data.clients.one]
        train = "train.jsonl"
        test = "test.jsonl"
        [evaluation]
        others_rows = 2
        max_new_tokens = 1
        [federation]
        rounds = 1
        [compare.variants]
        long = ["method.name=zero_shot", "training.max_length=200"]
        short = ["method.name=zero_shot", "training.max_length=80"]
    """
    (tmp_path / "recipe.toml").write_text(recipe)
    found = {}
    for order in (["long", "short"], ["short", "long"]):
        monkeypatch.setattr(runner, "_workspace", None)
        out = tmp_path / "-".join(order)
        assert run_comparison(plan_comparison(tmp_path / "recipe.toml", entries=order, seeds=1), out) == []
        for name in order:
            summary = RunDirectory.open(out / "runs" / name / "seed-0").summary()
            found[order[0], name] = summary["clients"]["one"]["nll"]["zero_shot"]
    assert found["long", "long"] == found["short", "long"]
    assert found["long", "short"] == found["short", "short"]
    assert found["long", "long"] != found["long", "short"]


@pytest.mark.slow
def test_two_workers_find_what_one_finds(
    plan: Planned, started: Path, comparison: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Runs = []
    failed = run_comparison(
        plan(), started, workers=2, on_done=lambda job, _: seen.append((job.entry.name, job.seed))
    )
    assert failed == []
    assert sorted(seen) == sorted(SOME)
    found, alone = (without_measured(c) for c in (collect_comparison(started), comparison))
    assert json.dumps(found | {"title": "out"}) == json.dumps(alone)


@pytest.mark.faults
def test_a_comparison_that_was_killed_ends_as_if_it_had_not_been(
    plan: Planned, started: Path, comparison: dict[str, Any], work: Path
) -> None:
    """SIGKILL while a run is in its rounds, after one of the runs that were left has finished."""
    code = (
        "import sys; from pathlib import Path; from flexperts.studies.entries import plan_comparison;"
        "from flexperts.studies.runner import run_comparison;"
        "run_comparison(plan_comparison(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, work / "recipe.toml", started], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    left = [started / "runs" / entry / f"seed-{seed}" for entry, seed in SOME]
    try:
        deadline = time.monotonic() + 240
        while not (left[0] / "done").exists() or not any((run / "rounds.jsonl").exists() for run in left[1:]):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    undone = [run for run in left if not (run / "done").exists()]
    assert undone
    assert any((run / "config.toml").exists() for run in undone)
    assert run_comparison(plan(), started) == []
    assert without_measured(collect_comparison(started)) == without_measured(comparison) | {"title": "started"}


def test_what_an_interrupted_start_noticed_is_kept(tmp_path: Path) -> None:
    """A worker's notices are shown when its run ends, which may be after another start."""
    runner._Notes(tmp_path / "notes.txt").notice("bank: no score")
    again = runner._Notes(tmp_path / "notes.txt")
    for text in ("bank: no score", "cafe: no score"):
        again.notice(text)
    assert (tmp_path / "notes.txt").read_text().splitlines() == ["bank: no score", "cafe: no score"]
