"""What is wrong with a run is found before it writes anything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from flexperts.config.run import RunConfig
from flexperts.data.prompts import PromptEncoder
from flexperts.data.sources import read_source
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, ConfigError, DataError, FlexpertsError
from flexperts.files import write_text
from flexperts.testing import byte_tokenizer

Recipe = Callable[..., RunConfig]


@pytest.fixture
def dense_base(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=260, max_position_embeddings=1024, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "override",
    [
        "training.max_length=16",
        "graft.experts=9",
        "lora.projections=['w_proj']",
        "method.name=fedavgg",
        "method.reference=fedavgg",
        "model.base=/nowhere/at/all",
        "model.device=banana",
    ],
)
def test_a_refused_run_leaves_nothing(recipe: Recipe, tmp_path: Path, override: str) -> None:
    with pytest.raises(FlexpertsError):
        run_federation(recipe(override), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_place_of_the_run_directory_is_refused(recipe: Recipe, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="it is a file, or its parent is a file"):
        run_federation(recipe(), tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_dense_base_is_refused_even_if_only_the_reference_grafts(
    recipe: Recipe, tmp_path: Path, dense_base: Path
) -> None:
    settings = (f"model.base={dense_base}", "method.name=fedavg", "method.reference=flex")
    with pytest.raises(FlexpertsError, match="no experts modules"):
        run_federation(recipe(*settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_base_is_welcome_where_nothing_grafts(recipe: Recipe, tmp_path: Path, dense_base: Path) -> None:
    summary = run_federation(recipe(f"model.base={dense_base}", "method.name=fedavg"), tmp_path / "out")
    assert summary["mean"]["rouge_l"]["global"] is not None


def test_a_column_that_the_recipe_names_must_exist(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,response,passage_text\na,b,c\n")
    with pytest.raises(DataError, match="pasage_text"):
        read_source(str(tmp_path / "a.csv"), {"context": "pasage_text"})


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="EOS"):
        PromptEncoder(tokenizer)


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ArtifactError, match="cannot be written"):
            write_text(tmp_path / "x", "a" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.name=hetlora", "method.options={ranks = {klinik = 2}}"], "did you mean 'clinic'"),
        (["method.name=fedamole", "method.options={experts = 1}"], "1 experts"),
        (["graft.layers=[7]"], "graft.layers names 7"),
    ],
)
def test_settings_that_do_not_fit_clients_or_base_are_refused_before_anything_is_written(
    recipe: Callable[..., RunConfig], tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(FlexpertsError, match=said):
        run_federation(recipe(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ray_without_the_extra_is_refused(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine.kind needs it; run pip install 'flexperts\[ray\]'"):
        run_federation(recipe("engine.kind=ray"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ray_takes_no_list_of_devices(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="Ray gives each actor a card"):
        recipe("engine.kind=ray", "engine.devices=['cpu']")
