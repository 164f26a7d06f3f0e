"""Commands and settings that need an extra say so before they work, and the extras that messages name exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from flexperts.cli.main import app
from flexperts.data.clients import load_clients
from flexperts.data.silos.generate import write_silos
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, FlexpertsError
from flexperts.recipe import load_recipe, parse_recipe

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


NEEDED = {
    "partition": ("flwr_datasets", '[data.partition]\nsource = "all.jsonl"\nby = "iid"\nclients = 2\n'),
    "privacy": ("dp_accounting", '[privacy]\nnoise = "local"\n'),
    "knowledge": ("lm_eval", '[knowledge]\nmmlu = "hub"\n'),
    "quantization": ("bitsandbytes", '[model]\nquantization = "int8"\n'),
    "ray": ("ray", '[engine]\nkind = "ray"\n'),
}
"""Extra -> a module of it, and a setting that needs it."""
REFUSED = """
import contextlib, io, json, sys
from flexperts.cli.main import main
found = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.modules[module], sys.argv, said, code = None, ["flexperts", *arguments], io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said):
            main()
    except SystemExit as ended:
        code = ended.code
    del sys.modules[module]
    found.append([code, said.getvalue(), [*sys.modules]])
print(json.dumps(found))
"""
"""Runs commands, each without a module; prints exit codes, errors, and the modules that are loaded after each."""


def needing(extra: str, folder: Path) -> Path:
    """Write a recipe without rows or base, so that whatever is read first is refused."""
    text = NEEDED[extra][1] + ("" if extra == "partition" else '[data]\nfolder = "none"\n')
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, str, list[str]]]:
    """Extra and command -> what the command did without the extra, all in one fresh process."""
    cases = [(extra, command) for extra in NEEDED for command in ("run", "compare")]
    asked = [
        [NEEDED[extra][0], command, str(needing(extra, tmp_path_factory.mktemp(extra)))] for extra, command in cases
    ]
    words = [sys.executable, "-c", REFUSED, json.dumps(asked)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path_factory.mktemp("cwd"))
    return dict(zip(cases, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("command", ["run", "compare"])
@pytest.mark.parametrize("extra", NEEDED)
def test_a_setting_is_refused_before_anything_is_loaded(
    extra: str, command: str, refusals: dict[tuple[str, str], tuple[int, str, list[str]]]
) -> None:
    code, said, loaded = refusals[extra, command]
    assert code == 2
    assert f"run pip install 'flexperts[{extra}]'" in said
    assert not {"torch", "transformers", "datasets"} & set(loaded)


@pytest.mark.parametrize("extra", NEEDED)
def test_a_library_call_too(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NEEDED[extra][0], None)
    config = load_recipe(needing(extra, tmp_path), ["method.name=fedavg"])
    with pytest.raises(ConfigError, match=re.escape(f"flexperts[{extra}]")):
        run_federation(config, tmp_path / "out")


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize(
    ("extra", "setting"), [("quantization", 'quantization = "nf4"'), ("privacy", '[policy]\nnoise = "local"')]
)
def test_a_silo_too(
    extra: str, setting: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, NEEDED[extra][0], None)
    silo = tomllib.loads(f'name = "clinic"\nstate = "state"\nbase = "none"\n{setting}')
    (tmp_path / "silo.toml").write_text(tomli_w.dumps(silo | {"data": {"train": "none.jsonl"}}))
    result = CliRunner().invoke(app, ["silo", command, str(tmp_path / "silo.toml")])
    assert f"flexperts[{extra}]" in f"{result.exception} {result.output}"
    assert not (tmp_path / "state").exists()


def test_every_extra_of_a_setting_is_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    of_commands = {"llama-cpp", "report", "serve", "tensorboard"}
    of_silos = {"metrics"}
    assert project["optional-dependencies"].keys() == NEEDED.keys() | of_commands | of_silos | {"docs", "dev"}


def test_the_extras_that_messages_and_pages_name_exist() -> None:
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    texts = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    named = set(re.findall(r"flexperts\[(\w+)\]", texts)) | set(re.findall(r'optional\("(\w+)"', texts))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"partition", "report", "serve"} <= named <= project["optional-dependencies"].keys()
