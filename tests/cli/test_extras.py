"""Commands and settings that need an extra say so before they work, and the extras that messages name exist."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexperts.cli.main import app
from flexperts.data.clients import load_clients
from flexperts.data.silos.generate import write_silos
from flexperts.errors import ConfigError, FlexpertsError
from flexperts.recipe import parse_recipe

ROOT = Path(__file__).parents[2]


def refused(*arguments: str) -> str:
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, FlexpertsError), error
    return str(error)


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("no_matplotlib")
def test_a_report_without_matplotlib_is_refused(tmp_path: Path) -> None:
    assert "pip install 'flexperts[report]'" in refused("report", str(tmp_path))


@pytest.mark.usefixtures("no_matplotlib")
def test_a_comparison_is_refused_before_it_trains(tiny_base: Path, tmp_path: Path) -> None:
    write_silos(tmp_path / "silos", 0, 8, 4)
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(f'[model]\nbase = "{tiny_base}"\n[data]\nfolder = "silos"\n')
    said = refused("compare", str(recipe), "--methods", "flex,fedavg", "--out", str(out))
    assert "pip install 'flexperts[report]'" in said
    assert not out.exists()


def test_a_partition_without_flwr_datasets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    rows = [{"instruction": f"question {n}", "response": "answer"} for n in range(40)]
    (tmp_path / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = '[model]\nbase = "b"\n[data.partition]\nsource = "all.jsonl"\nby = "iid"\nclients = 2\n'
    config = parse_recipe(recipe, folder=tmp_path)
    with pytest.raises(ConfigError, match=re.escape("pip install 'flexperts[partition]'")):
        load_clients(config.data, seed=0)


def test_the_extras_that_messages_and_pages_name_exist() -> None:
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    texts = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    named = set(re.findall(r"flexperts\[(\w+)\]", texts)) | set(re.findall(r'optional\("(\w+)"', texts))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"partition", "report", "serve"} <= named <= project["optional-dependencies"].keys()
