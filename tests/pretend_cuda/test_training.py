"""Local training on a card: where tensors are, what it asks torch for, how much memory it takes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from card import Block, Counts

from flexperts.config.run import RunConfig
from flexperts.costs.models import describe, meta_base
from flexperts.costs.preflight import on_device
from flexperts.costs.speed import Workload, set_up, train
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, ModelError
from flexperts.methods.registry import method_names
from flexperts.modeling.cards import check_cards
from flexperts.modeling.forward import autocast
from flexperts.modeling.load import LoadedBase, load_base
from flexperts.modeling.lora import LoraAdapters
from flexperts.modeling.repeatable import repeatable
from flexperts.recipe import parse_recipe
from flexperts.seeding import seeded
from flexperts.testing import FAMILIES, METHOD_SETTINGS, save_tiny_base

Recipe = Callable[..., RunConfig]
CHECKPOINTING = "training.gradient_checkpointing=true"
SMALL = (
    "data.silos={train_rows=4, test_rows=4}",
    "training={local_steps=1, micro_batch_size=2, max_length=320}",
    "federation.rounds=1",
    "evaluation={max_new_tokens=1, rows=1}",
    "graft={calibration_tokens=64, calibration_rows=2}",
    "model.precision=bf16",
)


@pytest.fixture(scope="session")
def without_shared_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sizes in a family whose layers end with their experts."""
    folder = tmp_path_factory.mktemp("olmoe")
    sizes = {"hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 4, "num_experts": 8}
    return save_tiny_base(folder / "wide", "olmoe", **sizes)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers whose experts are nearly all of the weights."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 32, "moe_intermediate_size": 256, "num_hidden_layers": 4, "num_experts": 8}
    return save_tiny_base(folder / "wide", **sizes)


def loaded(folder: Path, *settings: str) -> tuple[LoadedBase, RunConfig]:
    config = parse_recipe("data.silos = {}", [f"model.base={folder}", "model.dtype=float32", *settings])
    return load_base(config.model), config


def trained(base: LoadedBase, *settings: str, steps: int = 1) -> dict[str, torch.Tensor]:
    """Return what a few steps have trained."""
    with set_up(base, settings) as (model, split, config):
        train(model, split, config, Workload(rows=2, prompt=16, response=8, steps=steps))
        return {name: parameter.detach().cpu().clone() for name, parameter in split.trained.items()}


@pytest.mark.parametrize("method", method_names())
def test_every_method_runs(recipe: Recipe, tmp_path: Path, method: str) -> None:
    own = (*METHOD_SETTINGS.get(method, ()), *(("federation.rounds=2",) if method == "fedlease" else ()))
    run_federation(recipe(*SMALL, f"method.name={method}", *own), tmp_path / "run")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_under_cudas_autocast(tmp_path: Path, family: str) -> None:
    folder = save_tiny_base(tmp_path / "base", family, max_position_embeddings=256)
    base, config = loaded(folder, "model.dtype=bfloat16")
    lora = LoraAdapters(base.model, config.lora.model_copy(update={"projections": ()}), seed=0)
    ids = torch.randint(3, 250, (2, 16)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with autocast(ids.device, "bf16"):
        logits = lora.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits[:, -4:].float().square().mean().backward()
    found = {n: p.grad for n, p in lora.parameters().items() if p.grad is not None}
    assert found
    assert all(bool(grad.isfinite().all()) for grad in found.values())


@pytest.mark.parametrize("allowed", [True, False])
def test_training_never_uses_cudnns_attention_and_restores_the_users_choice(
    wide: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    attend, seen = F.scaled_dot_product_attention, []

    def noted(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    base, _ = loaded(wide)
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        trained(base, "method.name=fedavg")
        assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False] * 4


def peak_of(folder: Path, counts: Counts, *settings: str) -> tuple[int, int]:
    """Return the highest number of bytes on the card in training, and the bytes of the base there before."""
    gc.collect()
    before = Block.live
    base, config = loaded(folder, *settings)
    check_cards(base.model, config)
    start = Block.live
    counts.reset()
    trained(base, "method.name=fedavg", "lora.rank=1", *settings)
    return counts.peak - before, start - before


@pytest.mark.parametrize("folder", ["wide", "without_shared_experts"])
def test_offloading_with_checkpointing_saves_all_layers_but_one_as_the_estimate_says(
    folder: str, request: pytest.FixtureRequest, counts: Counts
) -> None:
    base: Path = request.getfixturevalue(folder)
    kept = 'model.device_map={"model.layers" = "cpu"}'
    whole, at_start = peak_of(base, counts, CHECKPOINTING)
    less, without = peak_of(base, counts, CHECKPOINTING, kept)
    layer = (at_start - without) // 4  # what every layer's experts take
    assert abs(layer - 8 * (3 * 256 * 32) * 4) < 1024
    assert whole - less >= 3 * layer - 4096
    _, config = loaded(base, CHECKPOINTING, kept)
    described = describe(str(base))
    counted = on_device(config, described, meta_base(described, "float32"), torch.device("cuda", 0))
    assert abs(counted - (without + layer)) < 4096


def test_offloading_without_checkpointing_is_refused_because_autograd_keeps_every_layer(
    wide: Path, counts: Counts
) -> None:
    kept = 'model.device_map={"model.layers" = "cpu"}'
    base, config = loaded(wide, kept)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing = false with model.device_map: .*on cuda:0"):
        check_cards(base.model, config)
    start = Block.live
    counts.reset()
    trained(base, "method.name=fedavg", "lora.rank=1", kept)
    assert counts.peak - start > 3 * 8 * (3 * 256 * 32) * 4  # what would happen


def test_experts_in_the_cpus_memory_are_pinned(wide: Path, counts: Counts) -> None:
    loaded(wide, 'model.device_map={"model.layers.1" = "cpu"}')
    assert counts.pinned == 8 * (3 * 256 * 32) * 4


def test_layers_on_two_cards_train_to_the_same_bits(wide: Path) -> None:
    spread = 'model.device_map={"model.layers.1" = "cuda:1", "model.layers.3" = "cuda:1"}'
    for method in ("fedavg", "flex"):
        own = (f"method.name={method}", "graft.calibration_tokens=64")
        one, _ = loaded(wide)
        two, config = loaded(wide, spread)
        check_cards(two.model, config)
        places = {str(p.device) for p in two.model.model.layers[1].parameters()}
        assert places == {"cuda:1"}
        expected, found = trained(one, *own, steps=2), trained(two, *own, steps=2)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_card_takes_whole_layers(wide: Path) -> None:
    with pytest.raises(ModelError, match=r"a card takes whole layers.*name a layer, such as .model\.layers\.0"):
        loaded(wide, 'model.device_map={"model.layers.1.mlp.experts" = "cuda:1"}')
    with pytest.raises(ConfigError, match="exclude each other"):
        loaded(wide, 'model.device_map={"model.layers.1" = "cuda:1", "model.layers.2" = "cpu"}')


def test_a_turn_asks_for_deterministic_algorithms_and_gives_settings_back() -> None:
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    with repeatable(card):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    with repeatable(cpu):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("own", [None, ":16:8"])
def test_cublas_gets_fixed_workspaces_unless_the_user_has_chosen_some(
    wide: Path, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    loaded(wide, "model.device=cpu")
    assert os.environ.get(name) == own
    loaded(wide)
    assert os.environ[name] == (own or ":4096:8")


def test_random_streams_of_cards_are_restored() -> None:
    places = ("cuda:0", "cuda:1", "cpu")
    torch.manual_seed(3)
    draws = [torch.rand(3, device=device) for device in places]
    torch.manual_seed(3)
    again = []
    for device in places:
        with seeded(7):
            inside = torch.rand(3, device=device).cpu()
        with seeded(7):
            assert torch.equal(torch.rand(3, device=device).cpu(), inside)
        again.append(torch.rand(3, device=device))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(draws, again, strict=True))
