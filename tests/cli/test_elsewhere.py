"""`--base` and `--data`: a run whose base and rows have moved, as users meet it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flexperts.cli.main import app
from flexperts.data.silos.generate import write_silos
from flexperts.errors import FlexpertsError
from flexperts.testing import save_tiny_base

RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[data]
folder = "silos"
[training]
max_length = 640
local_steps = 1
[federation]
rounds = 1
[evaluation]
max_new_tokens = 2
rows = 2
"""


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a finished run, from which base and rows were moved away."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_base, work / "base")
    write_silos(work / "silos", 0, 8, 4)
    (work / "recipe.toml").write_text(RECIPE.format(base=work / "base"))
    assert ask("run", str(work / "recipe.toml"), "--out", str(work / "run")).exit_code == 0
    (work / "away").mkdir()
    for name in ("base", "silos"):
        (work / name).rename(work / "away" / name)
    return work


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


def refused(*arguments: str) -> str:
    error = ask(*arguments).exception
    assert isinstance(error, FlexpertsError), error
    return str(error)


@pytest.mark.usefixtures("exports_checked_here")
def test_the_base_is_named_where_it_lies_now(moved: Path, tmp_path: Path) -> None:
    run, base = str(moved / "run"), ["--base", str(moved / "away" / "base")]
    asked = ["generate", run, "Say hi.", "--client", "clinic"]
    assert "give its new path as --base" in refused(*asked)
    assert ask(*asked, *base).exit_code == 0
    other = save_tiny_base(tmp_path / "other", seed=3, max_position_embeddings=1024)
    assert "give the path of that base as --base" in refused(*asked, "--base", str(other))
    done = ask("export", run, "--to", str(tmp_path / "out"), "--client", "shop", "--form", "personal", *base)
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    late = shutil.copytree(moved / "away" / "silos" / "shop", tmp_path / "late")
    copy = shutil.copytree(moved / "run", tmp_path / "run")
    done = ask("join", str(copy), "--data", f"{late}/train.jsonl", "--steps", "1", *base)
    assert done.exit_code == 0, done.exception


def test_rows_are_named_where_they_lie_now(moved: Path) -> None:
    run, base, rows = str(moved / "run"), ["--base", str(moved / "away" / "base")], moved / "away" / "silos"
    assert "give rows from another place with `flexperts evaluate --data`" in refused("evaluate", run, *base)
    whole = ask("evaluate", run, *base, "--data", str(moved / "away"))
    assert whole.exit_code == 0, whole.exception
    assert "other rows" not in whole.stdout
    assert "each client's own scored rows" in whole.stdout
    one = ask("evaluate", run, *base, "--data", f"shop={rows}/shop/test.jsonl")
    (line,) = [line for line in whole.stdout.splitlines() if "│ shop" in line]
    assert line.split("│")[2:] == next(r for r in one.stdout.splitlines() if "│ shop" in r).split("│")[2:]
    assert "│ clinic" not in one.stdout
    strange = ask("evaluate", run, *base, "--data", f"shop={rows}/clinic/test.jsonl")
    assert re.search(r"note: shop: these 4 rows are not those that the run uses for scoring", strange.stdout)
    assert re.search(r"│ shop \(other rows\) +│", strange.stdout)
    assert "rows given here" in strange.stdout


def test_a_silo_names_its_base_in_its_file(tmp_path: Path) -> None:
    silo = tmp_path / "silo.toml"
    silo.write_text('name = "a"\nstate = "state"\nbase = "b"\n[data]\ntrain = "t.jsonl"\n')
    assert "a silo's base is named in its file" in refused("serve", "0" * 32, "--silo", str(silo), "--base", "x")
