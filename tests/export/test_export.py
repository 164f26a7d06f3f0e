"""`flexperts export` on finished runs: each form, loaded by its card's code, computes what the run does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexperts.artifacts import RunDirectory
from flexperts.cli.main import main
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, ConfigError
from flexperts.export import exporting
from flexperts.export.content import logits_of
from flexperts.export.exporting import Export, export_run
from flexperts.export.verification import LogitDifference, verify

Recipe = Callable[..., RunConfig]
SHORT = (
    "data.silos.train_rows=4",
    "training.lr=0.05",
    "training.personal_lr=0.3",
    "federation.rounds=1",
    "evaluation.max_new_tokens=1",
    "evaluation.rows=1",
)
OTHER_MODEL = """
import torch

class model:
    eval = staticmethod(lambda: None)
    def __new__(cls, input_ids, use_cache):
        cls.logits = torch.zeros(1, 3, 5)
        return cls
"""
K2 = ("graft.experts=2", "graft.rank=4", "graft.scale=least_squares")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that trains a method with some settings, once."""

    @cache
    def make(method: str = "flex", *settings: str) -> Path:
        out = tmp_path_factory.mktemp("runs") / "run"
        run_federation(recipe(*SHORT, f"method.name={method}", *settings), out)
        return out

    return make


@pytest.fixture(autouse=True)
def loaded(exports_checked_here: list[tuple[str, Tensor, Tensor]]) -> list[tuple[str, Tensor, Tensor]]:
    return exports_checked_here


def exact(done: Export) -> None:
    """Refuse an export whose logits differ from the run's by more than fp32's rounding."""
    assert done.difference is not None
    assert done.difference.relative < 1e-5
    assert done.difference.same == 1


@pytest.mark.parametrize(
    ("settings", "client"),
    [
        (("flex", "graft.output=expert"), "clinic"),
        (("flex", "graft.output=expert", *K2), "shop"),
        (("flex", "graft.output=expert", "graft.sharing=both"), "clinic"),
        (("flex", "graft.output=expert", "graft.gate_start=router"), "clinic"),
        (("flex", "graft.output=difference", "graft.experts=2"), "shop"),
        (("local",), "clinic"),
    ],
)
def test_grafts_are_exported_with_code_and_as_a_mailable_folder(
    run: Run, tmp_path: Path, settings: tuple[str, ...], client: str, loaded: list[Any], tiny_base: Path
) -> None:
    path = run(*settings)
    exact(export_run(path, tmp_path / "whole", client=client))
    exact(export_run(path, tmp_path / "mail", client=client, form="personal"))
    assert (tmp_path / "whole" / "grafts.py").exists()
    for folder in ("whole", "mail"):
        card = (tmp_path / folder / "README.md").read_text()
        assert ("opens to the difference" in card) is ("graft.output=difference" in settings)
    (_, tokens, whole), (_, _, mailed) = loaded
    assert torch.equal(whole, mailed)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert LogitDifference.between(logits_of(base, tokens), whole).relative > 1e-2


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (("flex",), {"form": "merged"}),
        (("flex", "graft.place=in_place"), {"client": "clinic"}),
        (("flex", "graft.place=in_place", "graft.rank=4"), {"client": "clinic"}),
        (("moe_fedavg",), {"form": "merged"}),
        (("fedmoe_da",), {"client": "shop"}),
        (("ditto",), {"client": "clinic"}),
        (("flora",), {"form": "merged"}),
        (("fedex_lora",), {"form": "merged"}),
    ],
)
def test_without_grafts_the_folder_is_the_stock_architecture(
    run: Run, tmp_path: Path, settings: tuple[str, ...], options: Any
) -> None:
    exact(export_run(run(*settings), tmp_path / "out", **options))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    ("method", "client", "state"),
    [
        ("flex", "clinic", "global"),
        ("flex", None, "global"),
        ("ditto", "shop", "personalized"),
        ("flora", None, "global"),
        ("fedex_lora", None, "global"),
    ],
)
def test_an_adapter_is_the_clients_effective_lora(
    run: Run, tmp_path: Path, method: str, client: str | None, state: str
) -> None:
    done = export_run(run(method), tmp_path / "out", client=client, form="adapter")
    exact(done)
    assert done.state == state


def test_the_global_adapter_is_what_the_run_keeps_as_shared(run: Run, tmp_path: Path) -> None:
    export_run(run(), tmp_path / "out", form="adapter")
    mine, kept = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", RunDirectory(run()).shared)
    )
    assert mine.keys() == kept.keys()
    assert all(torch.equal(mine[n], kept[n]) for n in kept)


def test_a_common_graft_is_part_of_the_global_model(run: Run, tmp_path: Path) -> None:
    path = run("flex", "graft.sharing=shared")
    exact(export_run(path, tmp_path / "out", state="global"))
    assert (tmp_path / "out" / "grafts.py").exists()
    with pytest.raises(ConfigError, match="no standard architecture"):
        export_run(path, tmp_path / "merged", form="merged")


def test_another_type_is_stored_and_half_the_size(run: Run, tmp_path: Path) -> None:
    whole, half = (
        export_run(run(), tmp_path / dtype, client="clinic", dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    sizes = [(e.folder / "model.safetensors").stat().st_size for e in (whole, half)]
    assert 0.5 <= sizes[1] / sizes[0] < 0.6
    assert half.difference is not None
    assert half.difference.relative < 0.05
    mail = export_run(run(), tmp_path / "mail", client="clinic", form="personal", dtype="bfloat16")
    assert load_file(mail.folder / "graft.safetensors").values().__iter__().__next__().dtype == torch.bfloat16


def test_every_form_loads_in_a_fresh_process(run: Run, tmp_path: Path, loaded: list[Any]) -> None:
    """As files alone: nothing of this process is there, and of flexperts only what the mailable form needs."""
    forms = ("transformers", "merged", "adapter", "personal")
    for form in forms:
        export_run(run("flex", *K2), tmp_path / form, client="clinic", form=form, check=form == "personal")
    code = ["import sys", "from safetensors.torch import load_file, save_file", "found = {}"]
    save_file({"tokens": loaded[0][1]}, tmp_path / "tokens.safetensors")
    for form in forms:
        code += [card_code(tmp_path / form), "ids = load_file('tokens.safetensors')['tokens']"]
        code += [f"found['{form}'] = model.eval()(input_ids=ids).logits.detach().contiguous()"]
        code += ["assert 'flexperts' not in sys.modules"] if form != "personal" else []
    code.append("save_file(found, 'logits.safetensors')")
    base = Path(RunDirectory(run("flex", *K2)).config_toml.split('base = "')[1].split('"')[0])
    (tmp_path / base.name).symlink_to(base)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, cwd=tmp_path, env=environment)
    found = load_file(tmp_path / "logits.safetensors")
    reference = loaded[0][2]
    assert LogitDifference.between(found["transformers"], reference).relative < 1e-5
    assert LogitDifference.between(found["personal"], reference).relative < 1e-5
    assert LogitDifference.between(found["adapter"], found["merged"]).relative < 1e-5
    assert LogitDifference.between(found["merged"], reference).relative > 1e-2


def card_code(folder: Path) -> str:
    """The code block of a folder's card."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def test_the_card_says_what_it_is_and_holds_no_row(run: Run, tmp_path: Path) -> None:
    done = export_run(run(), tmp_path / "out", client="clinic")
    card = (done.folder / "README.md").read_text()
    scores = RunDirectory(run()).summary()["clients"]["clinic"]
    assert f"({scores['nll']['personalized']:.2f})" in card
    assert "`flex`" in card
    assert "Share the model only with people who may see the rows" in card
    assert "16 train rows in all, of which 4 are clinic's" in card
    assert str(run().parent) not in card
    for line in (run() / "predictions" / "clinic.jsonl").read_text().splitlines():
        assert json.loads(line)["instruction"] not in card


def test_the_mailable_folder_says_in_json_what_it_belongs_to(run: Run, tmp_path: Path) -> None:
    export_run(run(), tmp_path / "out", client="clinic", form="personal")
    about = json.loads((tmp_path / "out" / "personal.json").read_text())
    summary = RunDirectory(run()).summary()
    choice = json.loads((run() / "selection" / "clinic.json").read_text())["choice"]
    assert about["client"] == "clinic"
    assert about["base"]["fingerprint"] == summary["base"]["fingerprint"]
    assert about["grafted_experts"]["graft"] == choice


@pytest.mark.parametrize(
    ("method", "options", "error", "said"),
    [
        ("flex", {"client": "nobody"}, ConfigError, "the run's clients are clinic"),
        (
            "flex",
            {"form": "onnx", "client": "clinic"},
            ConfigError,
            "transformers, merged, adapter, personal, gguf",
        ),
        ("flex", {"state": "best", "client": "clinic"}, ConfigError, "flex has the states"),
        ("flex", {"state": "zero_shot", "client": "clinic"}, ConfigError, "use the base itself"),
        ("flex", {"dtype": "int3", "client": "clinic"}, ConfigError, "bfloat16, float32"),
        ("flex", {"dtype": "bfloat16", "form": "adapter"}, ConfigError, "leave --dtype out"),
        ("flex", {}, ConfigError, "no --client"),
        ("flex", {"client": "clinic", "form": "adapter", "state": "personalized"}, ConfigError, "more than LoRA"),
        ("ditto", {"client": "clinic", "form": "personal"}, ConfigError, "use --form adapter"),
        ("moe_fedavg", {"client": "clinic", "form": "personal"}, ConfigError, "use --form transformers"),
        ("moe_fedavg", {"client": "clinic", "form": "adapter"}, ConfigError, "use --form transformers"),
        (
            "feddpa_f",
            {"client": "clinic"},
            ConfigError,
            "its weights change with every input; export --state global",
        ),
        ("fedamole", {"client": "clinic"}, ConfigError, "LoraMixture"),
        ("fedalt", {"client": "clinic"}, ConfigError, "RoutedLora"),
        ("fedamole", {"form": "merged"}, ConfigError, "fedamole has the states zero_shot, personalized"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(
    run: Run, tmp_path: Path, method: str, options: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=re.escape(said)):
        export_run(run(method), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "refused", "said"),
    [
        (
            "model.quantization=nf4",
            {"transformers", "merged", "personal", "gguf"},
            "generate` or `flexperts serve`",
        ),
        ("model.device_map=auto", {"transformers", "merged", "gguf"}, "use --form adapter or personal"),
    ],
)
def test_a_form_that_needs_weights_which_the_run_has_not_is_refused(
    recipe: Callable[..., RunConfig], setting: str, refused: set[str], said: str
) -> None:
    for form in exporting.FORMS:
        if form in refused:
            with pytest.raises(ConfigError, match=re.escape(said)):
                exporting._check_base(recipe(setting), form)
        else:
            exporting._check_base(recipe(setting), form)


def test_a_folder_that_exists_is_left_alone(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it already exists"):
        export_run(run(), tmp_path, client="clinic")


def test_a_run_of_another_base_or_one_that_has_not_finished_is_refused(run: Run, tmp_path: Path) -> None:
    broken, foreign = tmp_path / "broken", tmp_path / "foreign"
    shutil.copytree(run(), broken)
    (broken / "summary.json").unlink()
    with pytest.raises(ArtifactError, match="the run has not finished"):
        export_run(broken, tmp_path / "out", client="clinic")
    shutil.copytree(run(), foreign)
    recipe = (foreign / "config.toml").read_text()
    (foreign / "config.toml").write_text(recipe.replace('dtype = "float32"', 'dtype = "bfloat16"'))
    with pytest.raises(ArtifactError, match="belongs to base"):
        export_run(foreign, tmp_path / "out", client="clinic")
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_its_check_is_never_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "verify", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(run(), tmp_path / "out", form="merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loading", "said"),
    [
        ("raise OSError('no such model')", "a fresh process cannot load it (OSError: no such model)"),
        ("import flexperts", "a fresh process cannot load it"),
        (OTHER_MODEL, "its logits differ from the run's by more than rounding"),
    ],
)
def test_what_does_not_load_or_computes_something_else_fails_the_check(loading: str, said: str) -> None:
    stream = torch.Generator().manual_seed(0)
    with pytest.raises(ArtifactError, match=re.escape(said)):
        verify(loading, torch.ones(1, 3, dtype=torch.long), torch.randn(1, 3, 5, generator=stream), torch.float32)


def test_a_difference_beyond_float32_is_said_to_be_of_bfloat16() -> None:
    assert [LogitDifference(1.0, relative, 1.0, 9).is_coarse for relative in (0.0, 9e-4, 2e-3)] == [
        False,
        False,
        True,
    ]


def test_the_command_says_what_it_wrote_and_how_far_it_is_from_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["flexperts", "export", str(run()), "--form", "merged", "--to", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert not ended.value.code
    assert "state global" in said
    assert re.search(
        r"largest logit difference \S+ \(\S+ % of the logits' spread\), same next token at (\d+) of \1 ", said
    )
    assert (tmp_path / "out" / "config.json").exists()
