"""The code that an export with grafts carries: loaded as users load it, it computes what the run does."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexperts.export.content import Content, logits_of, unfit
from flexperts.export.folders import write_model
from flexperts.modeling.load import LoadedBase
from flexperts.moe.experts import find_experts
from flexperts.parts.grafts import Grafts
from flexperts.testing import FAMILIES, VOCABULARY, byte_tokenizer, tiny_model

OTHER_LAYOUTS = {"dbrx", "jetmoe", "llama4_text"}
TOKENS = torch.randint(0, VOCABULARY - 4, (2, 12), generator=torch.Generator().manual_seed(3))


def grafts_of(model: Any, rank: Any = "full", count: int = 2, difference: bool = False) -> Grafts:
    """Grafts that have moved away from the pretrained experts, with gates of their own and factors."""
    experts = find_experts(model)
    choice = {e.name: tuple(range(count)) for e in experts}
    scales = {e.name: (0.5, 1.0)[:count] for e in experts}
    settings: Any = {"rank": rank, "alpha": 4.0, "gate_bias": 0.3, "scales": scales, "difference": difference}
    grafts = Grafts(experts, choice, **settings)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in grafts.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    return grafts.attach()


def loaded_base(model: Any) -> LoadedBase:
    return LoadedBase(model, byte_tokenizer(), "", "")


def exported(model: Any, grafts: dict[str, Grafts], folder: Path) -> Any:
    """The model of the exported folder, whose logits hold what the grafts do to a thousandth of that."""
    reference = logits_of(model, TOKENS)
    for part in grafts.values():
        part.detach()
    effect = (reference - logits_of(model, TOKENS)).abs().max()
    write_model(folder, loaded_base(model), Content({}, 1.0, grafts, [], [], reference))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    assert effect > 0
    assert (logits_of(loaded, TOKENS) - reference).abs().max() <= 1e-3 * effect
    return loaded


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_loaded_folder_computes_what_the_grafted_model_did(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    grafts = grafts_of(model)
    if family in OTHER_LAYOUTS:
        assert "does not store its experts as fused tensors" in unfit(grafts)
        return
    assert not unfit(grafts)
    loaded = exported(model, {"graft": grafts}, tmp_path / "out")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (loaded.generate(TOKENS, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_parts_on_one_layer_and_low_ranks_are_written_as_whole_experts(tmp_path: Path, dtype: Any) -> None:
    model = tiny_model("gpt_oss", dtype=dtype)
    grafts = {"common_graft": grafts_of(model, rank=4), "graft": grafts_of(model, count=1, difference=True)}
    reference = logits_of(model, TOKENS)
    for part in grafts.values():
        part.detach()
    effect = (reference - logits_of(model, TOKENS)).abs().max()
    write_model(tmp_path / "out", loaded_base(model), Content({}, 1.0, grafts, [], [], reference))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", trust_remote_code=True)
    assert loaded.dtype == dtype
    assert (logits_of(loaded, TOKENS) - reference).abs().max() <= {torch.float32: 1e-3, torch.bfloat16: 0.1}[
        dtype
    ] * effect
    assert loaded.model.layers[0].mlp.experts.graft.up.shape[0] == 3


def test_a_copy_of_the_loaded_model_has_grafts_of_its_own(tmp_path: Path) -> None:
    model = tiny_model()
    loaded = exported(model, {"graft": grafts_of(model)}, tmp_path / "out")
    before, twin = logits_of(loaded, TOKENS), copy.deepcopy(loaded)
    for name, parameter in twin.named_parameters():
        if ".graft." in name:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(logits_of(loaded, TOKENS), before)
    assert not torch.equal(logits_of(twin, TOKENS), before)


def test_what_does_not_know_grafts_refuses_the_folder(tmp_path: Path) -> None:
    """Loaded as the stock architecture, the model would answer without its grafts and nobody would be told."""
    model = tiny_model()
    exported(model, {"graft": grafts_of(model)}, tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GraftedQwen2MoeForCausalLM"]
    assert config["model_type"] == "grafted_qwen2_moe"


def test_a_loaded_model_saved_again_loads_again(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    loaded = exported(model, {"graft": grafts_of(model)}, tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits_of(again, TOKENS), logits_of(loaded, TOKENS))


def test_the_code_of_an_export_imports_torch_and_transformers_alone(tmp_path: Path) -> None:
    model = tiny_model()
    exported(model, {"graft": grafts_of(model)}, tmp_path / "out")
    for name, allowed in (("grafts.py", {"torch"}), ("modeling_grafted.py", {"transformers", "grafts"})):
        tree = ast.parse((tmp_path / "out" / name).read_text())
        found = {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        found |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert found - {"__future__", "collections", "typing"} == allowed
