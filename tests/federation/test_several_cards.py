"""One client on several cards: two processes with a divided base compute what one process computes, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, ModelError
from flexperts.modeling.cards import check_cards, shard_layers
from flexperts.recipe import load_recipe, parse_recipe
from flexperts.testing import FAMILIES, tiny_model

ROOT = Path(__file__).parents[2]
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
RUNS = (
    "model.dtype=float32 model.precision=fp32 method.name=fedavg",
    "model.dtype=float32 model.precision=fp32 method.name=flex",
    "method.name=flex graft.rank=4 training.gradient_checkpointing=true",
)
SMALL = """
    data.silos.train_rows=4 data.silos.test_rows=4 training.max_length=640
    federation.rounds=2 training.local_steps=2 evaluation.max_new_tokens=2 evaluation.rows=2
"""
LAYOUTS = ("qwen2_moe", "gpt_oss", "dbrx", "llama4_text", "granitemoe")


def on_two(*arguments: str | Path) -> list[str]:
    """Return the lines that two processes print."""
    command = (*LAUNCH, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "tests/federation/ranks.py")
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def states(run: Path) -> dict[Path, dict[str, torch.Tensor]]:
    return {file.relative_to(run): load_file(file) for file in run.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def several(tiny_base: Path) -> list[str]:
    return [f"model.base={tiny_base} {SMALL} {run}" for run in RUNS]


@pytest.fixture(scope="module")
def done(several: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Two processes do all tasks: the folder of the runs, the line of the layers, the line of the refusals."""
    folder = tmp_path_factory.mktemp("two")
    tiny_model("mixtral").save_pretrained(folder / "base")
    tasks = ("runs", folder, *several, "--", "layers", *LAYOUTS, "--", "refusals", folder / "base")
    layers, refusals = (line for line in on_two(*tasks) if line.startswith("["))
    return folder, layers, refusals


def test_two_processes_with_half_a_base_each_are_one_process(
    several: list[str], done: tuple[Path, str, str], tmp_path: Path
) -> None:
    shutil.copytree(done[0], tmp_path / "two")
    for number, overrides in enumerate(several):
        config = load_recipe(ROOT / "recipes" / "quickstart.toml", overrides.split())
        here = run_federation(config, tmp_path / "one" / str(number))
        there = json.loads((tmp_path / "two" / str(number) / "summary.json").read_text())
        assert there["clients"] == here["clients"]
        assert there["base"] == here["base"]
        one, two = (states(tmp_path / processes / str(number)) for processes in ("one", "two"))
        assert len(one) > 4
        assert one.keys() == two.keys()
        for file, tensors in one.items():
            assert tensors.keys() == two[file].keys()
            assert all(torch.equal(tensors[name], two[file][name]) for name in tensors), file
    longer = parse_recipe(config.to_toml(), ["federation.rounds=3"])
    assert run_federation(longer, tmp_path / "two" / "2", resume=True)["rounds"] == 3


def test_a_divided_base_computes_and_is_read_as_a_whole_one(done: tuple[Path, str, str]) -> None:
    assert json.loads(done[1]) == list(LAYOUTS)


@pytest.mark.families
def test_every_divided_base_computes_and_is_read_as_a_whole_one() -> None:
    assert json.loads(on_two("layers", *FAMILIES)[-1]) == list(FAMILIES)


def test_noise_and_tensor_parallelism_are_refused_by_name(done: tuple[Path, str, str]) -> None:
    noise, tensor = json.loads(done[2])
    assert "privacy.noise = 'local' with a base that is divided over processes" in noise
    assert "a base with tensor parallelism" in tensor


def test_layers_on_two_cards_of_one_process_are_refused_by_name() -> None:
    model = tiny_model()
    with FakeTensorMode():  # no card is needed
        model.model.norm.weight = nn.Parameter(torch.empty(8, device="cuda:1"))
    with pytest.raises(ModelError, match=r"a base on cpu, cuda:1.*a client computes on one device"):
        check_cards(model, parse_recipe("data.silos = {}"))


def test_a_device_map_over_cards_is_refused_by_name() -> None:
    for given in ('{"model.layers.1" = "cuda"}', '{"model.layers.1" = 1}', '"balanced"'):
        with pytest.raises(ConfigError, match=r"is not a place for experts: .*several cards"):
            parse_recipe("data.silos = {}", [f"model.device_map={given}"])


def test_offloaded_weights_are_not_divided() -> None:
    with pytest.raises(ModelError, match=r"leave out model.quantization and model.device_map"):
        shard_layers(tiny_model().to("meta"), torch.device("cpu"))


@pytest.mark.parametrize("command", ["run", "compare", "silo", "report"])
def test_a_command_in_several_processes_is_refused(command: str) -> None:
    environment = {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT / "src")}
    arguments = (sys.executable, "-m", "flexperts", command, "x")
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: WORLD_SIZE = 2: each of these processes would do the whole command")
