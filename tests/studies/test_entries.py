"""What a comparison would run: names, settings on top of settings, refusals before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexperts.errors import ConfigError
from flexperts.methods.registry import method_names
from flexperts.studies.entries import ComparisonPlan, plan_comparison
from flexperts.studies.runner import jobs

Planned = Callable[..., ComparisonPlan]
RECIPE = """
[data.silos]
[method]
name = "fedprox"
options = { mu = 0.5 }
reference = "fedavg"
[training]
lr = 0.001
[compare]
seeds = 2
[compare.variants]
strong = ["method.options.mu=9", "training.lr=0.002"]
other = ["method.name=fedavgm", "method.options.momentum=0.5"]
fedlease = ["method.options={warmup_rounds=1}"]
scaffold = ["training.optimizer=sgd", "training.lr=0.5"]
"""


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    def make(*entries: str, settings: tuple[str, ...] = (), **arguments: object) -> ComparisonPlan:
        (tmp_path / "recipe.toml").write_text(RECIPE)
        return plan_comparison(tmp_path / "recipe.toml", settings, entries=entries, **arguments)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(
    ("entries", "arguments", "said"),
    [
        (("fedprox", "fedavgg"), {}, ["entry 'fedavgg'", "did you mean 'fedavg'?"]),
        (("stron",), {}, ["entry 'stron'", "did you mean 'strong'?"]),
        (("qqqqq",), {}, ["define it under [compare.variants]"]),
        (("fedavg", "strong", "fedavg"), {}, ["names must be unique"]),
        (("fedavg",), {"seeds": 0}, ["seeds = 0", "at least one"]),
        (("fedavg",), {"settings": ("compare.seeds=0",)}, ["compare.seeds = 0"]),
        (("strong",), {"settings": ("method.name=fedavg", "method.options={}")}, ["mu"]),
        (("fedprox",), {"settings": ("method.options.my=1",)}, ["my"]),
    ],
    ids=["method", "variant", "unknown", "twice", "seeds", "recipe-seeds", "variant-option", "option"],
)
def test_what_cannot_run_is_refused(
    planned: Planned, entries: tuple[str, ...], arguments: dict[str, object], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*entries, **arguments)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["a,b", " ", "all"])
def test_a_name_that_could_not_be_listed_is_refused(planned: Planned, name: str) -> None:
    with pytest.raises(ConfigError, match="holds no comma, is not empty"):
        planned("fedavg", settings=(f'compare.variants={{"{name}" = ["training.lr=0.1"]}}',))


def test_the_recipes_method_and_its_reference_stand_for_entries_that_nobody_named(planned: Planned) -> None:
    plan = planned()
    assert [entry.name for entry in plan.entries] == ["fedprox", "fedavg"]
    assert plan.seeds == (0, 1)


def test_all_stands_for_every_method_that_is_not_named(planned: Planned) -> None:
    plan = planned("strong", "fedprox", "all", "other")
    names = [entry.name for entry in plan.entries]
    assert (names[:2], names[-1]) == (["strong", "fedprox"], "other")
    assert sorted(names[1:-1]) == sorted(method_names())
    assert plan.entries[names.index("scaffold")].settings[-1] == "training.lr=0.5"


def test_arguments_go_before_the_recipe(planned: Planned) -> None:
    section = 'compare={entries = ["fedavg", "fedprox"], reference = "fedprox", seeds = 2}'
    plan = planned("fedavgm", "fedavg", settings=(section,), seeds=4, reference="fedavg")
    assert [entry.name for entry in plan.entries] == ["fedavgm", "fedavg"]
    assert (plan.reference, plan.seeds) == ("fedavg", (0, 1, 2, 3))
    assert planned(settings=(section,)).reference is None


def test_every_run_has_its_own_settings_and_none_of_anothers(planned: Planned) -> None:
    plan = planned("fedprox", "fedavg", "strong", "other", "scaffold", settings=("lora.rank=4",))
    for seed in plan.seeds:
        prox, avg, strong, other, scaffold = (plan.config(entry, seed) for entry in plan.entries)
        made = [(c.method.name, c.method.options, c.training.lr) for c in (prox, avg, strong, other, scaffold)]
        assert made == [
            ("fedprox", {"mu": 0.5}, 0.001),
            ("fedavg", {}, 0.001),
            ("fedprox", {"mu": 9}, 0.002),
            ("fedavgm", {"momentum": 0.5}, 0.001),
            ("scaffold", {}, 0.5),
        ]
        assert scaffold.training.optimizer == "sgd"
        assert {c.seed for c in (prox, avg, strong, other, scaffold)} == {seed}
        assert {c.lora.rank for c in (prox, avg, strong, other, scaffold)} == {4}
        assert {c.method.reference for c in (prox, avg, strong, other, scaffold)} == {None}


def test_jobs_go_seed_by_seed_into_folders_of_their_own(planned: Planned, tmp_path: Path) -> None:
    planned()
    plan = planned("fedavg", "a/b: c", settings=('compare.variants={"a/b: c" = []}',), seeds=2)
    found = jobs(plan, tmp_path)
    assert [(job.entry.name, job.seed) for job in found] == [
        ("fedavg", 0), ("a/b: c", 0), ("fedavg", 1), ("a/b: c", 1),
    ]  # fmt: skip
    folders = [job.folder.relative_to(tmp_path / "runs").as_posix() for job in found]
    assert folders == ["fedavg/seed-0", "a_b__c/seed-0", "fedavg/seed-1", "a_b__c/seed-1"]
    assert not any(job.done for job in found)
