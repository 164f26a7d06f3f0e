"""The two adapters: who is in use, at which weight, what trains, and that the base comes back untouched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from flexperts.config.model import LoraConfig
from flexperts.errors import ConfigError
from flexperts.modeling.lora import LoraAdapters, Weight
from flexperts.testing import tiny_model

IDS = torch.arange(36).reshape(3, 12)
ROWS = torch.tensor([0.0, 1.0, -0.75])
OTHER_ROWS = torch.tensor([2.0, 0.25, 0.0])


def adapters(base: Any | None = None, **settings: Any) -> LoraAdapters:
    base = base if base is not None else tiny_model(seed=1)
    given = {"rank": 3, "alpha": 6.0, "projections": (), "seed": 5, "personal": True} | settings
    config = LoraConfig.model_validate({n: given.pop(n) for n in LoraConfig.model_fields if n in given})
    return LoraAdapters(base, config, **given)


@torch.no_grad()
def fill(lora: LoraAdapters) -> LoraAdapters:
    """Give all factors random values: B starts at zero, which would hide everything."""
    stream = torch.Generator().manual_seed(9)
    for name, parameter in sorted(lora.parameters().items()):
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream))
        assert parameter.std() > 0, name
    return lora


@pytest.fixture
def lora() -> LoraAdapters:
    return fill(adapters())


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def merged(lora: LoraAdapters, shared: float, personal: float, ids: Tensor) -> Tensor:
    """What a base computes into which both adapters were merged by hand: W0 + s (a B A + b B' A')."""
    factors = {n: p.detach().double() for n, p in lora.parameters().items()}
    base = tiny_model(seed=1)
    for target in lora.targets:
        for prefix, weight in (("base_model.", shared), ("personal.base_model.", personal)):
            if f"{prefix}model.{target}.lora_A.weight" in factors:
                a, b = (factors[f"{prefix}model.{target}.lora_{f}.weight"] for f in "AB")
                base.get_submodule(target).weight.data += (2.0 * weight * b @ a).float()  # alpha / rank = 2
    return logits(base, ids)


def by_rows(lora: LoraAdapters, shared: Weight, personal: Weight) -> Tensor:
    pairs = zip(*(w.tolist() if isinstance(w, Tensor) else [w] * len(IDS) for w in (shared, personal)), strict=True)
    return torch.cat([merged(lora, a, b, IDS[i : i + 1]) for i, (a, b) in enumerate(pairs)])


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


# Names


def test_names(lora: LoraAdapters) -> None:
    targets = [f"base_model.model.model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    shared = {f"{target}.lora_{f}.weight" for target in targets for f in "AB"}
    assert lora.parameters().keys() == shared | {f"personal.{name}" for name in shared}
    assert adapters(personal=False).parameters().keys() == shared


def test_named_parameters_are_the_adapters_own() -> None:
    lora = adapters(projections=("q_proj",))
    assert len(lora.targets) == 2
    layer: Any = lora.module(lora.targets[0])
    ours = lora.parameters()
    for adapter, prefix in (("default", ""), ("personal", "personal.")):
        for factor, parameter in (("A", layer.lora_A[adapter].weight), ("B", layer.lora_B[adapter].weight)):
            assert ours[f"{prefix}base_model.model.{lora.targets[0]}.lora_{factor}.weight"] is parameter


def test_frozen_is_all_the_rest(lora: LoraAdapters) -> None:
    frozen, base = lora.frozen(), tiny_model(seed=1)
    assert not frozen.keys() & lora.parameters().keys()
    assert sum(p.numel() for p in frozen.values()) == sum(p.numel() for p in base.parameters())
    assert not any(p.requires_grad for p in frozen.values())


def test_unknown_projections_are_refused() -> None:
    with pytest.raises(ConfigError, match="no_proj"):
        adapters(projections=("no_proj",))


# The start


def test_all_silos_and_both_adapters_start_alike() -> None:
    torch.manual_seed(123)
    one = adapters().parameters()
    state = torch.get_rng_state()
    other = adapters().parameters()
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name])
        assert torch.equal(parameter, one[name.removeprefix("personal.")])
        assert bool(parameter.any()) == (".lora_A." in name)
    assert not any(torch.equal(p, one[n]) for n, p in adapters(seed=6).parameters().items() if ".lora_A." in n)


def test_untrained_adapters_compute_the_base() -> None:
    lora = adapters()
    plain = logits(tiny_model(seed=1))
    for weights in ({}, {"shared": 1.0}, {"personal": 1.0}, {"shared": ROWS, "personal": 0.5}):
        with lora.use(**weights):
            assert torch.equal(logits(lora.model), plain)


# Who computes


def test_only_the_shared_adapter_is_used_by_default(lora: LoraAdapters) -> None:
    close(logits(lora.model), merged(lora, 1, 0, IDS))
    with torch.no_grad():
        before = logits(lora.model)
        for name, parameter in lora.parameters().items():
            if name.startswith("personal."):
                parameter.zero_()
    assert torch.equal(logits(lora.model), before)


@pytest.mark.parametrize(
    ("shared", "personal"),
    [
        (1.0, None), (None, 1.0), (1.0, 1.0), (None, None), (0.25, None), (None, -2.0), (0.5, 0.75), (0.0, 1.0),
        (1, 0.3), (ROWS, None), (None, ROWS), (ROWS, OTHER_ROWS), (1.0, ROWS), (OTHER_ROWS, 0.5),
    ],
)  # fmt: skip
def test_weights_equal_a_merge_by_hand(lora: LoraAdapters, shared: Weight | None, personal: Weight | None) -> None:
    """y = W0 x + a dW_shared x + b dW_personal x, with one weight for all, or one per row."""
    given = {n: w for n, w in (("shared", shared), ("personal", personal)) if w is not None}
    default = logits(lora.model)
    with lora.use(**given):
        ours = logits(lora.model)
    close(ours, by_rows(lora, *(0.0 if w is None else w for w in (shared, personal))))
    assert torch.equal(logits(lora.model), default)


def test_the_weights_matter(lora: LoraAdapters) -> None:
    """Else the merge by hand would prove nothing."""
    corners = [merged(lora, a, b, IDS) for a in (0, 1) for b in (0, 1)]
    for i, one in enumerate(corners):
        assert all((one - other).abs().max() > 0.01 for other in corners[:i])


def test_without_a_second_adapter(lora: LoraAdapters) -> None:
    single = fill(adapters(personal=False))
    close(logits(single.model), merged(single, 1, 0, IDS))
    with single.use(shared=0.5):
        close(logits(single.model), merged(single, 0.5, 0, IDS))
    with single.use():
        assert torch.equal(logits(single.model), logits(tiny_model(seed=1)))


def test_off_is_the_base_itself(lora: LoraAdapters) -> None:
    with lora.use():
        assert torch.equal(logits(lora.model), logits(tiny_model(seed=1)))


def test_uses_can_be_nested(lora: LoraAdapters) -> None:
    with lora.use(shared=1.0, personal=1.0):
        both = logits(lora.model)
        with lora.use(personal=0.5):
            close(logits(lora.model), merged(lora, 0, 0.5, IDS))
        assert torch.equal(logits(lora.model), both)
        with lora.use():
            assert torch.equal(logits(lora.model), logits(tiny_model(seed=1)))
        assert torch.equal(logits(lora.model), both)
    close(logits(lora.model), merged(lora, 1, 0, IDS))


def test_an_error_inside_ends_the_use(lora: LoraAdapters) -> None:
    default = logits(lora.model)
    for weights in ({}, {"personal": 0.5}, {"shared": ROWS, "personal": 1.0}):
        with pytest.raises(RuntimeError, match="broken"), lora.use(**weights):
            raise RuntimeError("broken")
        assert torch.equal(logits(lora.model), default)
    assert not any(m._forward_hooks for m in lora.model.modules())


# What trains


def gradients(lora: LoraAdapters, context: AbstractContextManager[object]) -> set[str]:
    for parameter in lora.parameters().values():
        parameter.grad = None
    with context:
        lora.model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is None for p in lora.frozen().values())
    return {n for n, p in lora.parameters().items() if p.grad is not None and p.grad.any()}


def names(lora: LoraAdapters, *, shared: bool, personal: bool) -> set[str]:
    return {n for n in lora.parameters() if (personal if n.startswith("personal.") else shared)}


@pytest.mark.parametrize(
    ("weights", "shared", "personal"),
    [
        (None, True, False),
        ({"shared": 1.0}, True, False),
        ({"personal": 1.0}, False, True),
        ({"shared": 0.5, "personal": 0.5}, True, True),
        ({"shared": ROWS, "personal": OTHER_ROWS}, True, True),
        ({"shared": 0.0, "personal": 1.0}, False, True),
    ],
)
def test_gradients_flow_to_who_computes(
    lora: LoraAdapters, weights: dict[str, Weight] | None, shared: bool, personal: bool
) -> None:
    context = nullcontext() if weights is None else lora.use(**weights)
    assert gradients(lora, context) == names(lora, shared=shared, personal=personal)


def test_a_frozen_adapter_computes_without_gradients(lora: LoraAdapters) -> None:
    """The other one in use does not thaw it, and it does not go out of use."""
    for name, parameter in lora.parameters().items():
        parameter.requires_grad_(name.startswith("personal."))
    with lora.use(shared=1.0, personal=1.0):
        close(logits(lora.model), merged(lora, 1, 1, IDS))
    assert gradients(lora, lora.use(shared=1.0, personal=1.0)) == names(lora, shared=False, personal=True)


def test_gradients_are_scaled_by_the_weights() -> None:
    """One row at weight 0.5 trains half as much as at weight 1, in the first order: B is zero at the start."""
    grads = []
    for weight in (1.0, 0.5, torch.tensor([0.5, 0.5, 0.5])):
        lora = adapters()
        gradients(lora, lora.use(shared=weight))
        grads.append({n: p.grad.clone() for n, p in lora.parameters().items() if p.grad is not None})
    for name, full in grads[0].items():
        torch.testing.assert_close(grads[1][name], 0.5 * full, rtol=1e-4, atol=1e-9)
        assert torch.equal(grads[2][name], grads[1][name])


def test_per_row_weights_pass_gradients_to_themselves(lora: LoraAdapters) -> None:
    """A gate that computes the weights can be trained through them."""
    weight = ROWS.clone().requires_grad_(True)
    with lora.use(shared=1.0, personal=weight):
        lora.model(input_ids=IDS).logits.square().mean().backward()
    assert weight.grad is not None
    assert weight.grad.ne(0).all()


@pytest.mark.parametrize(
    "weights", [{}, {"shared": 1.0}, {"personal": 0.5}, {"shared": ROWS, "personal": 1.0}], ids=str
)
@pytest.mark.parametrize("trained", ["none", "all", "shared", "personal", "B"])
def test_flags_survive_use(lora: LoraAdapters, weights: dict[str, Weight], trained: str) -> None:
    wanted = {
        "none": lambda name: False,
        "all": lambda name: True,
        "shared": lambda name: not name.startswith("personal."),
        "personal": lambda name: name.startswith("personal."),
        "B": lambda name: ".lora_B." in name,
    }[trained]
    for name, parameter in lora.parameters().items():
        parameter.requires_grad_(wanted(name))
    with lora.use(**weights):
        if weights:
            assert {n for n, p in lora.parameters().items() if p.requires_grad} == set(
                filter(wanted, lora.parameters())
            )
    assert {n for n, p in lora.parameters().items() if p.requires_grad} == set(filter(wanted, lora.parameters()))
    assert not any(p.requires_grad for p in lora.frozen().values())


def test_gradients_gathered_before_a_use_are_kept(lora: LoraAdapters) -> None:
    """A method may look at the base or at the other adapter between micro-batches."""
    gradients(lora, lora.use(shared=1.0, personal=1.0))
    before = {n: p.grad.clone() for n, p in lora.parameters().items() if p.grad is not None}
    for weights in ({}, {"personal": 1.0}):
        with lora.use(**weights):
            logits(lora.model)
    assert len(before) == 32
    assert all(torch.equal(lora.parameters()[n].grad, g) for n, g in before.items())  # type: ignore[arg-type]


# Back to the start


def test_reset_restores_the_start(lora: LoraAdapters) -> None:
    start = {n: p.detach().clone() for n, p in adapters().parameters().items()}
    gradients(lora, nullcontext())
    for parameter in lora.parameters().values():
        parameter.requires_grad_(False)
    lora._activate(["personal"])
    same = dict(lora.parameters())
    lora.reset()
    for name, parameter in lora.parameters().items():
        assert parameter is same[name]
        assert torch.equal(parameter, start[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    fill(lora)
    close(logits(lora.model), merged(lora, 1, 0, IDS))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("personal", [False, True])
def test_close_leaves_the_base_as_it_was(personal: bool, checkpointing: bool) -> None:
    base = tiny_model(seed=1)
    expected, kinds = logits(base), [type(m) for m in base.modules()]
    before = {n: (t, t.clone()) for n, t in base.state_dict(keep_vars=True).items()}
    lora = fill(adapters(base, personal=personal, checkpointing=checkpointing))
    lora.model.train()
    lora.model(input_ids=IDS).logits.square().mean().backward()
    lora.model.eval()
    if personal:
        with lora.use(personal=0.5):
            logits(lora.model)
    lora.close()
    after = base.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value)
        assert tensor.grad is None
        assert not tensor.requires_grad
    assert [type(m) for m in base.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert not base.is_gradient_checkpointing
    assert torch.equal(logits(base), expected)


def test_a_base_serves_one_run_after_another() -> None:
    base = tiny_model(seed=1)
    for personal in (True, False, True):
        lora = fill(adapters(base, personal=personal))
        close(logits(lora.model), merged(lora, 1, 0, IDS))
        lora.close()


# Dropout and checkpointing


def test_dropout_works_on_both_adapters_in_training_only() -> None:
    lora = fill(adapters(dropout=0.5))
    for weights in ({"shared": 1.0}, {"personal": 1.0}):
        with lora.use(**weights):
            still = logits(lora.model)
            assert torch.equal(logits(lora.model), still)
            lora.model.train()
            torch.manual_seed(0)
            dropped = [logits(lora.model) for _ in range(2)]
            torch.manual_seed(0)
            assert torch.equal(logits(lora.model), dropped[0])
            lora.model.eval()
        assert not torch.equal(dropped[0], still)
        assert not torch.equal(dropped[0], dropped[1])


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights", [{"shared": 1.0}, {"shared": 0.5, "personal": OTHER_ROWS}], ids=["one", "two"])
@pytest.mark.usefixtures("seeded")
def test_checkpointing_changes_no_gradient(weights: dict[str, Weight], dropout: float) -> None:
    """The backward pass computes the forward pass again: with the same adapters, weights and dropout."""
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        lora = fill(adapters(dropout=dropout, checkpointing=checkpointing))
        assert lora.base.is_gradient_checkpointing == checkpointing
        lora.model.train()
        gradients(lora, lora.use(**weights))
        grads.append({n: p.grad.clone() for n, p in lora.parameters().items() if p.grad is not None})
        lora.close()
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 16 * len(weights)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-8)


def test_checkpointing_computes_again() -> None:
    """Else the test above compares a thing with itself."""
    calls = []
    for checkpointing in (False, True):
        lora = adapters(checkpointing=checkpointing)
        lora.model.train()
        count: list[int] = []
        handle = lora.module(lora.targets[0]).register_forward_hook(lambda *_, count=count: count.append(1))
        gradients(lora, nullcontext())
        handle.remove()
        calls.append(len(count))
    assert calls == [1, 2]


def test_config_names_no_local_path_and_sorts(lora: LoraAdapters) -> None:
    entries = lora.peft_entries("/home/me/base")
    assert json.dumps(entries) == json.dumps(adapters(seed=8).peft_entries("/home/you/base"))
    assert entries["base_model_name_or_path"] == "base"
    assert entries["target_modules"] == sorted(entries["target_modules"])
    assert lora.peft_entries("org/name")["base_model_name_or_path"] == "org/name"
