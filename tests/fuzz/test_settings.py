"""Malformed recipes, silo files and overrides: refused cleanly, or they can be written down and read again."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from harness import NUMBERS, PLAIN, TEXT, clean_refusals, fuzz, mutated
from hypothesis import strategies as st
from pydantic import ValidationError

from flexperts.config import data, evaluation, federation, model, run
from flexperts.config.names import client_name
from flexperts.config.section import Section
from flexperts.parameters.store import PersonalMeta, PersonalStore
from flexperts.recipe import load_recipe, load_silo, parse_recipe

pytestmark = pytest.mark.fuzz

FOLDER = Path(__file__).parents[2] / "recipes"
WHOLE = [path.read_bytes() for path in sorted(FOLDER.glob("*.toml"))]
FULL = parse_recipe(
    """
    [data.clients.bank]
    train = "bank.csv"
    [method.options]
    mu = 0.1
    [compare.variants]
    more = ["training.lr=1"]
    """
)
TREE = FULL.model_dump(exclude_none=True, mode="json")
SECTIONS = [
    value
    for module in (data, evaluation, federation, model, run)
    for value in vars(module).values()
    if inspect.isclass(value) and issubclass(value, Section) and value is not Section
]
TOML_VALUES = st.recursive(
    st.one_of(st.booleans(), NUMBERS, TEXT, st.dates(), st.datetimes(), st.times()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)


def check(text: str, overrides: list[str], folder: Path) -> None:
    config = parse_recipe(text, overrides, folder=folder)
    written = config.to_toml()
    again = parse_recipe(written)
    assert again.to_toml() == written


def paths(tree: Any, *above: str) -> list[tuple[str, ...]]:
    """Return the paths of all settings and sections."""
    below = [paths(value, *above, key) for key, value in tree.items()] if isinstance(tree, dict) else []
    return [*([above] if above else []), *(path for some in below for path in some)]


def replaced(path: tuple[str, ...], value: Any, key: str | None) -> str:
    tree: Any = copy.deepcopy(TREE)
    inner = tree
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    if key is not None:
        inner[key] = value
    return tomli_w.dumps(tree)


@fuzz(1500, st.sampled_from(WHOLE).flatmap(mutated))
def test_mutated_recipes(content: bytes, folder: Path) -> None:
    (folder / "recipe.toml").write_bytes(content)
    load_recipe(folder / "recipe.toml").to_toml()


@fuzz(1500, st.tuples(st.sampled_from(paths(TREE)), TOML_VALUES, st.none() | TEXT))
def test_settings_of_other_types(change: Any, folder: Path) -> None:
    check(replaced(*change), [], folder)


@fuzz(300, st.dictionaries(TEXT | st.sampled_from(sorted(TREE)), TOML_VALUES, max_size=4))
def test_random_trees(tree: dict[str, Any], folder: Path) -> None:
    check(tomli_w.dumps(tree), [], folder)


@fuzz(500, st.one_of(st.text(max_size=80), st.text("[]{}='\"\n.#ab01-+e_:TZ\\ux,", max_size=60)))
def test_random_text(text: str, folder: Path) -> None:
    check(text, [], folder)


KEYS = st.one_of(TEXT, st.sampled_from([".".join(path) for path in paths(TREE)]))


@fuzz(
    1500, st.lists(st.one_of(TEXT, st.tuples(KEYS, TEXT | PLAIN.map(repr)).map("=".join)), min_size=1, max_size=3)
)
def test_overrides(overrides: list[str], folder: Path) -> None:
    check("[data.silos]\n", overrides, folder)


@fuzz(
    20, st.integers(1, 4000).map(lambda n: f"x = {'[' * n}{']' * n}") | st.integers(4000, 9000).map("seed=0x".ljust)
)
def test_deep_and_long_values(text: str, folder: Path) -> None:
    check(text.replace(" ", "f"), [text], folder)


@fuzz(800, st.tuples(st.sampled_from(SECTIONS), st.dictionaries(TEXT, PLAIN, max_size=2), st.data()))
def test_sections_refuse_by_validation_errors_alone(drawn: Any, folder: Path) -> None:
    section, tree, choose = drawn
    name = choose.draw(st.sampled_from(sorted(section.model_fields)))
    try:
        section.model_validate(tree | {name: choose.draw(PLAIN)})
    except ValidationError as error:
        assert error.errors()  # noqa: PT017


SILO = b"""
name = "bank"
state = "state"
base = "smol-moe"
[data]
train = "train.csv"
[policy]
methods = ["flex"]
noise = "local"
max_epsilon = 3.0
min_score_rows = 5
"""


@fuzz(400, mutated(SILO))
def test_silo_files(content: bytes, folder: Path) -> None:
    (folder / "silo.toml").write_bytes(content)
    silo = load_silo(folder / "silo.toml")
    assert silo.name
    client_name(silo.name)


@fuzz(800, st.one_of(TEXT, st.text("abc./\\-_ \0\u0661\u00e9", max_size=8), st.integers(190, 300).map("x".ljust)))
def test_no_client_name_leaves_its_folder(name: str, folder: Path) -> None:
    name = name.replace(" ", "a") if len(name) > 100 else name
    path = folder / "personal" / f"{client_name(name)}.safetensors"
    assert path.parent.resolve() == (folder / "personal").resolve()
    store = PersonalStore(path, "base")
    for number in (1, 2):
        store.save({}, PersonalMeta(name, "base", number, "", {}, {}))
    assert store.load(1) is not None
    for file in (path, store.older):
        file.unlink()


def test_the_examples_are_more_than_ten_thousand() -> None:
    """They are counted as they run; here stands what is planned."""
    from harness import PLANNED

    for name in ("messages", "files"):
        spec = importlib.util.spec_from_file_location(f"fuzz_{name}", Path(__file__).with_name(f"test_{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert sum(PLANNED.values()) >= 10_000


def test_the_harness_sees_unclean_errors(tmp_path: Path) -> None:
    caught = []
    for text in ("x = [", "[data.silos]\nx = 1"):
        with clean_refusals():
            parse_recipe(text)
            caught.append(text)
    assert caught == []
    for wrong in (KeyError("x"), ValueError("y")):
        try:
            with clean_refusals():
                raise wrong
        except type(wrong):
            caught.append("seen")
    assert caught == ["seen", "seen"]
    assert tomllib.loads(FULL.to_toml())["method"]["options"] == {"mu": 0.1}
