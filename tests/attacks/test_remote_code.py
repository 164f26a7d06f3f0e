"""Run directories and recipes that someone handed out, whose base brings code: a file alone never makes it run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexperts.cli import serve
from flexperts.cli.main import main
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.finished.joining import join
from flexperts.finished.trained import TrainedRun
from flexperts.serving.engine.engine import open_engine

Recipe = Callable[..., RunConfig]
FLAG = "--trust-remote-code"
CODE = """
from pathlib import Path
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

Path({marker!r}).touch()


class OwnConfig(Qwen2MoeConfig):
    model_type = {kind!r}


class OwnModel(Qwen2MoeForCausalLM):
    config_class = OwnConfig
"""
ROWS = "".join(f'{{"instruction": "Say {n}", "response": "{n}"}}\n' for n in range(12))


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_federation(recipe("federation.rounds=1", "evaluation.rows=1", "evaluation.max_new_tokens=1"), out)
    return out


@pytest.fixture(params=["own_moe", "qwen2_moe"])
def handed(request: pytest.FixtureRequest, finished: Path, tiny_base: Path, tmp_path: Path) -> Path:
    """A run directory with a base in it that brings code, whether or not its type is known without that code."""
    run = tmp_path / "handed"
    shutil.copytree(finished, run)
    shutil.copytree(tiny_base, run / "base")
    (run / "base" / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran"), kind=request.param))
    settings = json.loads((run / "base" / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (run / "base" / "config.json").write_text(
        json.dumps(settings | {"auto_map": classes, "model_type": request.param})
    )
    text = (run / "config.toml").read_text()
    assert "trust_remote_code = false" in text
    text = text.replace("trust_remote_code = false", "trust_remote_code = true")
    (run / "config.toml").write_text(text.replace(str(tiny_base), str(run / "base")))
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep transformers' copies of planted code out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(serve, "_end_on_signals", lambda: None)
    monkeypatch.setattr(serve, "_log_to_stderr", lambda: None)


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> object:
    """Run a command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["flexperts", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


COMMANDS = {
    "generate": ["generate", "{run}", "Hi", "--client", "shop"],
    "evaluate": ["evaluate", "{run}"],
    "export": ["export", "{run}", "--to", "{place}/out", "--client", "shop"],
    "export_adapter": ["export", "{run}", "--to", "{place}/out", "--form", "adapter", "--client", "shop"],
    "join": ["join", "{run}", "--data", "{place}/rows.jsonl"],
    "serve": ["serve", "{run}", "--port", "0"],
    "with_base": ["generate", "{run}", "Hi", "--client", "shop", "--base", "{run}/base"],
    "run": ["run", "{run}/config.toml", "--out", "{place}/again"],
    "resume": ["run", "{run}/config.toml", "--out", "{run}", "--resume"],
    "compare": ["compare", "{run}/config.toml", "--methods", "fedavg", "--out", "{place}/compared"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_it_because_a_file_says_so(
    handed: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(run=handed, place=handed.parent) for word in COMMANDS[command]]
    assert call(monkeypatch, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "config.toml: model.trust_remote_code = true" in errors[0]
    assert FLAG in errors[0]
    assert not (handed.parent / "ran").exists()


SAYS = ["--set", "model.trust_remote_code=true"]
UNSAYS = ["--set", "model.trust_remote_code=false"]
SETTING = {
    "run": COMMANDS["run"],
    "compare": [*COMMANDS["compare"], "--seeds", "1"],
    "inspect": ["inspect", "{run}/base"],
}


@pytest.mark.parametrize("command", SETTING)
def test_a_setting_on_the_command_line_runs_it(
    handed: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for said in ([*SAYS, *UNSAYS], [*UNSAYS, *SAYS]):
        assert not (handed.parent / "ran").exists()
        words = [word.format(run=handed, place=handed.parent / said[-1]) for word in SETTING[command]]
        call(monkeypatch, *words, *said)
    assert "a file alone must not decide that" not in capsys.readouterr().err
    assert (handed.parent / "ran").exists()


@pytest.mark.parametrize("said", [[], UNSAYS, [*SAYS, *UNSAYS]])
def test_no_variant_of_a_recipe_says_it(
    handed: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = handed / "config.toml"
    text = recipe.read_text().replace("trust_remote_code = true", "trust_remote_code = false")
    recipe.write_text(f"{text}\n[compare.variants]\nodd = ['model.trust_remote_code=true']\n")
    words = ["compare", recipe, "--methods", "odd", "--out", handed.parent / "compared", *said]
    assert call(monkeypatch, *words) == 2
    assert "a file alone must not decide that" in capsys.readouterr().err
    assert not (handed.parent / "ran").exists()


def test_a_plan_runs_none(handed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "plan", handed / "base", "--methods", "fedavg", *SAYS)
    assert not (handed.parent / "ran").exists()


def test_no_function_does(handed: Path) -> None:
    rows = handed.parent / "rows.jsonl"
    for use in (lambda: TrainedRun(handed), lambda: open_engine(handed), lambda: join(handed, rows)):
        with pytest.raises(ConfigError, match=FLAG):
            use()
    assert not (handed.parent / "ran").exists()


def test_a_file_that_asks_for_nothing_runs_nothing(
    handed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option alone does not either: the recipe must ask for it too."""
    text = (handed / "config.toml").read_text()
    (handed / "config.toml").write_text(text.replace("trust_remote_code = true", "trust_remote_code = false"))
    assert call(monkeypatch, "generate", handed, "Hi", "--client", "shop", FLAG) in (None, 0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not (handed.parent / "ran").exists()


def test_the_option_runs_it(handed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "generate", handed, "Hi", "--client", "shop", FLAG)
    assert (handed.parent / "ran").exists()
