"""A comparison small enough to run whole: three clients of unequal size who answer in letters of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe
from flexperts.studies.collect import collect_comparison
from flexperts.studies.entries import ComparisonPlan, plan_comparison
from flexperts.studies.runner import run_comparison
from flexperts.testing import byte_tokenizer, save_tiny_base

Rows = list[dict[str, str]]
LETTERS = {"bank": "etao", "cafe": "insh", "farm": "etin"}
TEST_ROWS = {"bank": 3, "cafe": 4, "farm": 6}
RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[data]
folder = "clients"
validation_fraction = 0.3
[method]
name = "flex"
[training]
max_length = 128
local_epochs = 2
lr = 0.01
personal_lr = 0.3
[federation]
rounds = 2
[evaluation]
every = 1
max_new_tokens = 8
others_rows = 2
routing_rows = 2
[knowledge]
general = "general.jsonl"
general_rows = 2
[compare]
seeds = 2
entries = ["fedavg", "flex", "local", "zero_shot", "k2"]
reference = "flex"
resamples = 500
[compare.variants]
k2 = ["graft.experts=2"]
"""


def rows(who: str, side: str, count: int) -> Rows:
    """Rows with responses of unequal length, so that weighting by rows and by tokens gives other means."""
    letters = LETTERS.get(who, "rdlu")
    return [
        {"instruction": f"{who} {side} {i}?", "response": " ".join((letters * 2)[i % 4 : i % 4 + 2 + i % 3])}
        for i in range(count)
    ]


def write(path: Path, lines: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def speaking_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that says nothing but a few letters and spaces: random bytes would never score by ROUGE-L."""
    folder = save_tiny_base(tmp_path_factory.mktemp("base") / "speaking", seed=4)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    silent = [i for i in range(len(head)) if i not in byte_tokenizer().encode("etaoin ")]
    head[silent] = 0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, speaking_base: Path) -> Path:
    """A folder with a recipe, its clients' rows, and tasks that no client trains on."""
    folder = tmp_path_factory.mktemp("study")
    for client, count in TEST_ROWS.items():
        write(folder / "clients" / client / "train.jsonl", rows(client, "train", 6 + count))
        write(folder / "clients" / client / "test.jsonl", rows(client, "test", count))
    write(folder / "general.jsonl", rows("general", "", 3))
    (folder / "recipe.toml").write_text(RECIPE.format(base=speaking_base), encoding="utf-8")
    return folder


@pytest.fixture
def plan(work: Path) -> Callable[..., ComparisonPlan]:
    """Return a function that plans the folder's recipe, with settings on top."""

    def make(*settings: str, **arguments: Any) -> ComparisonPlan:
        return plan_comparison(work / "recipe.toml", settings, **arguments)

    return make


@pytest.fixture(scope="session")
def compared(work: Path) -> Path:
    """The whole comparison, run once; tests must not write into it."""
    out = work / "out"
    assert run_comparison(plan_comparison(work / "recipe.toml"), out, workers=1) == []
    return out


@pytest.fixture(scope="session")
def comparison(compared: Path) -> dict[str, Any]:
    """What it comes to."""
    return collect_comparison(compared)


@pytest.fixture(scope="session")
def entries(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its entries by name."""
    return {entry["name"]: entry for entry in comparison["entries"]}


@pytest.fixture(scope="session")
def single(work: Path) -> Path:
    """The recipe as one run with a reference, weights kept; tests must not write into it."""
    out = work / "single"
    run_federation(load_recipe(work / "recipe.toml", ("method.reference=fedavg",)), out)
    return out
