"""A device belongs to the command, not to the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flexperts.cli.main import app
from flexperts.config.changes import recipe_changes
from flexperts.config.run import RunConfig, as_written_now
from flexperts.engines.run import run_federation
from flexperts.environment import DEVICE
from flexperts.errors import ModelError
from flexperts.modeling.placement import computing_device
from flexperts.observer import Observer

Recipe = Callable[..., RunConfig]
TINY = ("federation.rounds=1", "evaluation.max_new_tokens=1", "evaluation.rows=1", "training.local_steps=1")


class Notices(Observer):
    def __init__(self) -> None:
        self.told: list[str] = []

    def notice(self, text: str) -> None:
        self.told.append(text)


def test_a_recipe_without_and_with_a_device_is_one_run(recipe: Recipe) -> None:
    assert recipe().to_toml() == recipe("model.device=cuda:1").to_toml()
    assert "device =" not in recipe("model.device=cuda:1").to_toml()


def test_a_directory_that_names_a_device_is_resumed_elsewhere(recipe: Recipe, tmp_path: Path) -> None:
    summary = run_federation(recipe(*TINY), tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    now = path.read_text()
    path.write_text(now.replace("[model]\n", '[model]\ndevice = "cuda:7"\n').replace("dequantize = false\n", ""))
    assert path.read_text() != now
    assert run_federation(recipe(*TINY), tmp_path / "run", resume=True) == summary
    assert as_written_now(path.read_text()) == now
    assert recipe_changes(now, as_written_now(path.read_text())) == "only in its formatting"


def test_a_directory_of_a_version_without_the_two_settings_goes_on_as_it_began(
    recipe: Recipe, tmp_path: Path
) -> None:
    papers = recipe(*TINY, "method.name=flex", "graft.output=expert", "training.personal_moments=fresh")
    whole = papers.model_copy(update={"federation": papers.federation.model_copy(update={"rounds": 2})})
    wanted = run_federation(whole, tmp_path / "whole")
    run_federation(papers, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    older = path.read_text().replace('output = "expert"\n', "").replace('personal_moments = "fresh"\n', "")
    assert older != path.read_text()
    path.write_text(older)
    more = recipe(*TINY, "method.name=flex", "federation.rounds=2")
    assert run_federation(more, tmp_path / "run", resume=True)["rounds"] == wanted["rounds"] == 2
    assert path.read_text() == (tmp_path / "whole" / "config.toml").read_text()


def test_the_key_of_the_recipe_still_works_and_is_told_to_be_deprecated(recipe: Recipe, tmp_path: Path) -> None:
    notices = Notices()
    with pytest.raises(ModelError, match=r"device .cuda:7.: torch cannot use it"):
        run_federation(recipe("model.device=cuda:7", *TINY), tmp_path / "run", notices)
    assert [text for text in notices.told if "device" in text] == [
        "model.device is deprecated: use --device or FLEXPERTS_DEVICE instead, until 0.3"
    ]


def test_the_command_decides_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert computing_device("cpu") == torch.device("cpu")
    monkeypatch.setenv(DEVICE, "cpu")
    assert computing_device("cuda:7") == torch.device("cpu")


def test_every_command_with_a_model_takes_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("run", "compare", "evaluate", "generate", "serve", "export", "join", "inspect"):
        monkeypatch.delenv(DEVICE, raising=False)
        done = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
        assert "--device" in done.output, command


def test_the_option_reaches_the_base(byte_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE, "")  # restored after the test
    done = CliRunner().invoke(app, ["inspect", str(byte_base), "--device", "cuda:7"])
    assert isinstance(done.exception, ModelError)
    assert "device 'cuda:7'" in str(done.exception)
