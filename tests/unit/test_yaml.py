"""YAML recipes: the same tree as TOML, and nothing that a reader of the file would take for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexperts.config.yaml_tree import yaml_tree
from flexperts.errors import ConfigError
from flexperts.recipe import load_recipe, load_silo

TOML = """
seed = 3
[model]
base = "tiny"
template_date = "2025-01-01"
chat_template_kwargs = {enable_thinking = false}
[data.clients.clinic]
train = "clinic.csv"
[data.clients.clinic.columns]
instruction = "question"
response = "answer"
[data.clients.no]
train = "norway.jsonl"
[data.clients.no.columns]
instruction = "question"
response = "answer"
[training]
lr = 1e-3
[graft]
layers = [0, -1]
"""
YAML = """
# a comment
seed: 3
model:
  base: tiny
  template_date: 2025-01-01          # text, not a date
  chat_template_kwargs: {enable_thinking: false}
data:
  clients:
    clinic:
      train: clinic.csv
      columns: &headers
        instruction: question
        response: answer
    no:                              # Norway is a name
      train: norway.jsonl
      columns: *headers
training:
  lr: 1e-3
graft:
  layers: [0, -1]
"""


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".YAML"])
def test_a_yaml_recipe_is_the_toml_recipe(tmp_path: Path, ending: str) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    (tmp_path / f"r{ending}").write_text("\ufeff" + YAML)
    assert load_recipe(tmp_path / f"r{ending}") == load_recipe(tmp_path / "r.toml")
    changed = load_recipe(tmp_path / f"r{ending}", ["training.lr=0.5"])
    assert changed.training.lr == 0.5


def test_a_silo_file_may_be_yaml(tmp_path: Path) -> None:
    (tmp_path / "silo.yaml").write_text("name: clinic\nstate: state\nbase: tiny\ndata: {train: rows.csv}\n")
    assert load_silo(tmp_path / "silo.yaml").data.train == str(tmp_path / "rows.csv")


def test_the_schema_is_one(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {silos: {seed: 1}}\ntrainign: {lr: 1}\n")
    with pytest.raises(ConfigError, match="did you mean 'training'"):
        load_recipe(tmp_path / "r.yaml")


def test_scalars_are_those_of_the_core_schema() -> None:
    text = "{a: [yes, no, on, off, y, 010, 1_000, 0x1F, 12:30, 1.2.3], b: [true, FALSE, -3, .5, 1e3, 2.], c: ['1']}"
    tree = yaml_tree(text, "r.yaml")
    assert tree["a"] == ["yes", "no", "on", "off", "y", "010", "1_000", "0x1F", "12:30", "1.2.3"]
    assert [(type(v), v) for v in tree["b"]] == [
        (bool, True),
        (bool, False),
        (int, -3),
        (float, 0.5),
        (float, 1000.0),
        (float, 2.0),
    ]
    assert tree["c"] == ["1"]


def test_merged_mappings_fill_in_what_is_not_there() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: [*a, *b]\n  x: 9\n"
    assert yaml_tree(text, "r.yaml")["c"] == {"x": 9, "y": 2, "z": 4}


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nmodel: {base: x}\nseed: 2", "line 3: the key 'seed' occurs twice"),
        ("model:\n  base: x\n  base: y", "line 3: the key 'base' occurs twice"),
        ("data:\n  folder:", "line 2: a key or item has no value"),
        ("data:\n  folder: ~", "no value"),
        ("1: x", "a key must be text; put it in quotes"),
        ("true: x", "a key must be text"),
        ("[a]: x", "a key must be text"),
        ("- a", "a recipe is a mapping"),
        ("a: !!python/name:os.system", "has no meaning in a recipe"),
        ("a: !!binary aGk=", "has no meaning"),
        ("a: !!int x", "it is no int"),
        ("a: [1", "it is not valid YAML"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: *b", "undefined alias"),
        ("a: \x07", "not valid YAML"),
        ("a: 99999999999999999999", "at most 64 bits"),
        ("a: &a [*a]", "not valid YAML"),
        (BOMB, "too many values"),
        ("<<: 1", "<< takes a mapping"),
        ("a\tb: : c", "line 1"),
    ],
)
def test_what_is_refused_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(path))


def test_an_empty_file_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="data"):
        load_recipe(tmp_path / "r.yaml")
