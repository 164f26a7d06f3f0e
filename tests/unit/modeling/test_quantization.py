"""A quantized base is smaller where it says so, computes nearly the same, and gives its experts one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import get_total_byte_count

from flexperts.config.model import ModelConfig
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, ModelError
from flexperts.export.exporting import export_run
from flexperts.finished.trained import TrainedRun
from flexperts.modeling.load import LoadedBase, load_base
from flexperts.modeling.quantization import (
    ExpertsQuantization,
    ExpertsQuantizer,
    check_quantized,
    planned_bytes,
    storage,
)
from flexperts.moe.dispatch import BY_PAIRS
from flexperts.moe.experts import find_experts
from flexperts.moe.quantized import QuantizedTensor, Scheme, quantized_bytes
from flexperts.parts.grafts import Grafts
from flexperts.recipe import parse_recipe
from flexperts.testing import save_tiny_base, tiny_model

pytestmark = pytest.mark.quantization
SCHEMES = pytest.mark.parametrize("scheme", ["int8", "nf4"])
LAYERS, N, D, I = 2, 4, 32, 16  # noqa: E741
ERROR = {"int8": 0.01, "nf4": 0.12}
"""Relative errors of random normal weights in blocks of 64: about 0.006 and 0.09."""


def load(folder: Path, scheme: str = "none", dtype: str = "float32") -> LoadedBase:
    return load_base(ModelConfig(base=str(folder), dtype=dtype, precision="fp32", quantization=scheme))


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_nearly(scheme: Scheme, dtype: torch.dtype) -> None:
    full = weight(3, 16, 32, dtype=dtype)
    quantized = QuantizedTensor.quantize(full, scheme)
    back = quantized.dequantize()
    assert (back.shape, back.dtype) == (quantized.shape, quantized.dtype) == (full.shape, dtype)
    assert (back - full).float().norm() / full.float().norm() < ERROR[scheme]
    assert quantized.stored_bytes == quantized_bytes(full.shape, scheme)
    assert quantized.stored_bytes == 3 * 16 * 32 * (8 if scheme == "int8" else 4) / 8 + 4 * 3 * 16 * 32 / 64


@SCHEMES
def test_one_expert_is_a_view_of_its_own_codes(scheme: Scheme) -> None:
    quantized = QuantizedTensor.quantize(weight(4, 16, 32), scheme)
    one = quantized[2]
    assert isinstance(one, QuantizedTensor)
    assert one.codes.untyped_storage().data_ptr() == quantized.codes.untyped_storage().data_ptr()
    assert one.stored_bytes == quantized.stored_bytes // 4
    assert torch.equal(one.dequantize(), quantized.dequantize()[2])
    assert torch.equal(quantized[2].T.dequantize(), quantized.dequantize()[2].T)


@SCHEMES
def test_several_experts_are_copies_of_their_codes(scheme: Scheme) -> None:
    quantized, numbers = QuantizedTensor.quantize(weight(4, 16, 32), scheme), torch.tensor([2, 0, 2])
    some = quantized[numbers]
    assert isinstance(some, QuantizedTensor)
    assert torch.equal(some.dequantize(), quantized.dequantize()[numbers])


@SCHEMES
@pytest.mark.parametrize("product", [F.linear, lambda x, w: x @ w.mT], ids=["linear", "matmul"])
def test_products_and_gradients_are_those_of_the_values_and_autograd_keeps_codes(
    scheme: Scheme, product: Callable[..., torch.Tensor]
) -> None:
    quantized = QuantizedTensor.quantize(weight(4, 16, 32), scheme)[1]
    hidden, same = (weight(5, 32).requires_grad_() for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        output = product(hidden, quantized)
    expected = product(same, quantized.dequantize())
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(hidden.grad, same.grad)  # type: ignore[arg-type]
    assert kept
    assert all(isinstance(t, QuantizedTensor) for t in kept if t.shape != hidden.shape)


@SCHEMES
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_oss", "mixtral"])
def test_a_base_computes_with_the_values_of_its_codes(family: str, scheme: str, tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / family, family)
    full, quantized = load(folder).model, load(folder, scheme).model
    for ours, theirs in zip(find_experts(full), find_experts(quantized), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            stored = getattr(theirs.module, name)
            assert isinstance(stored, QuantizedTensor)
            getattr(ours.module, name).data = stored.dequantize()
    full.set_experts_implementation("eager")
    tokens = torch.arange(1, 33)[None]
    torch.testing.assert_close(quantized(tokens).logits, full(tokens).logits)


@SCHEMES
@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm", BY_PAIRS])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_cards_ways_compute_the_same_and_autograd_keeps_codes(
    family: str, way: str, scheme: str, tmp_path: Path
) -> None:
    model = load(save_tiny_base(tmp_path / family, family), scheme).model
    experts = find_experts(model)[0]
    hidden, same = (weight(5, D).requires_grad_() for _ in range(2))
    index = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [0, 2]])
    mixture = torch.full(index.shape, 0.5)
    expected = experts.module(same, index, mixture)
    model.set_experts_implementation(way)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        output = experts.module(hidden, index, mixture)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(hidden.grad, same.grad)
    codes = [t for t in kept if isinstance(t, QuantizedTensor)]
    assert len(codes) == 2
    assert all(t.dim() < 3 for t in kept if not isinstance(t, QuantizedTensor))


@SCHEMES
def test_the_table_counts_bytes(scheme: Scheme, byte_base: Path) -> None:
    experts = LAYERS * N * 3 * D * I
    base = load(byte_base, scheme, "bfloat16").model
    rows = {row.part: row for row in storage(base)}
    assert rows["routed experts"].types == (scheme,)
    assert rows["routed experts"].before == 2 * experts
    assert rows["routed experts"].after == quantized_bytes((experts,), scheme)
    for part in ("attention", "embeddings", "other"):
        assert (rows[part].types, rows[part].before) == (("bfloat16",), rows[part].after)
    assert sum(row.before for row in rows.values()) == sum(2 * p.numel() for p in base.parameters())
    planned = tiny_model("qwen2_moe", dtype=torch.bfloat16, max_position_embeddings=1024)
    assert planned_bytes(planned, scheme) == sum(row.after for row in rows.values())


def test_a_quantized_base_has_a_name_of_its_own(tiny_base: Path) -> None:
    names = [load(tiny_base, scheme).fingerprint for scheme in ("none", "int8", "nf4", "nf4")]
    assert names[2] == names[3]
    assert len(set(names)) == 3


def test_a_graft_reads_one_expert(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(tiny_base, "nf4").model
    read: list[tuple[int, ...]] = []
    dequantize = QuantizedTensor.dequantize

    def noted(tensor: QuantizedTensor) -> torch.Tensor:
        read.append(tuple(tensor.shape))
        return dequantize(tensor)

    monkeypatch.setattr(QuantizedTensor, "dequantize", noted)
    experts = find_experts(base)
    grafts = Grafts(experts, {e.name: (3,) for e in experts})
    assert set(read) == {(2 * I, D), (D, I)}
    values = experts[0].module.down_proj.dequantize()
    (first, _) = grafts
    assert torch.equal(first.personal[0].down, values[3])


@SCHEMES
@pytest.mark.parametrize("rank", ["full", "4"])
def test_a_run_on_a_quantized_base(
    scheme: str, rank: str, recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = recipe(f"model.quantization={scheme}", f"graft.rank={rank}", "federation.rounds=1")
    summary = run_federation(config, tmp_path / "run")
    assert summary["mean"]["nll"]["personalized"] < summary["mean"]["nll"]["zero_shot"]
    assert summary["bytes"]["personal_sent"] == 0


@pytest.mark.parametrize("form", [None, "personal", "transformers", "adapter"])
def test_a_model_with_grafts_of_a_quantized_base_is_used_in_its_run(
    recipe: Callable[..., RunConfig], tmp_path: Path, form: str | None
) -> None:
    """No exported folder has the quantized experts; the error names what does work, and LoRA alone is exported."""
    run_federation(recipe("model.quantization=int8", "federation.rounds=1"), tmp_path / "run")
    with pytest.raises(
        ConfigError, match="use the model in its run with `flexperts generate` or `flexperts serve`"
    ):
        export_run(tmp_path / "run", tmp_path / "out", client="clinic", form=form, state="personalized")
    assert not (tmp_path / "out").exists()
    assert TrainedRun(tmp_path / "run").generate("clinic", "Which?") is not None
    export_run(tmp_path / "run", tmp_path / "out", form="adapter", state="global")


def test_experts_that_stay_in_full_precision_are_refused_with_their_bytes() -> None:
    with pytest.raises(ModelError, match=r"12,288 of 12,288 bytes of expert weights stay in full precision"):
        check_quantized(tiny_model("olmoe", dtype=torch.bfloat16, num_hidden_layers=1), "some base")


def test_experts_of_odd_sizes_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "odd", "olmoe", hidden_size=40, intermediate_size=15)
    with pytest.raises(ModelError, match="not a multiple of 64 values"):
        load(folder, "int8")


@SCHEMES
def test_transformers_reserves_what_the_experts_will_take(tmp_path: Path, scheme: Scheme) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    quantizer = ExpertsQuantizer(ExpertsQuantization(scheme))
    quantizer._process_model_before_weight_loading(model)
    places = {name: torch.device("cuda", 0) for name, _ in model.named_parameters()}
    (reserved,) = get_total_byte_count(model, places, quantizer).values()
    assert reserved == planned_bytes(model, scheme)


def test_a_quantized_checkpoint_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained

    def marked(*args: object, **kwargs: object) -> object:
        config = read(*args, **kwargs)
        config.quantization_config = {"quant_method": "other"}
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", marked)
    with pytest.raises(ModelError, match="already quantized"):
        load(tiny_base, "int8")


def test_without_the_extra_the_error_says_what_to_install(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexperts.modeling.quantization.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'flexperts\[quantization\]"):
        load(tiny_base, "nf4")


def test_quantization_and_a_device_map_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        parse_recipe("data.silos = {}", ["model.quantization=nf4", "model.device_map=auto"])


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def get_input_embeddings(self) -> None:
        return None

    get_output_embeddings = get_input_embeddings


def test_a_dense_model_has_a_table_too() -> None:
    assert [row.part for row in storage(Dense())] == ["other"]
