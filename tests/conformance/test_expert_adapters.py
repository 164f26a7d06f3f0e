"""Adapters on pretrained experts: every family, both forms, against materialised weights and formulas by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from flexperts.errors import GraftError
from flexperts.moe.experts import find_experts
from flexperts.moe.flat import FlatExperts
from flexperts.moe.layout import LayerExperts
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.grafts import Grafts
from flexperts.testing import tiny_model

FORMS: dict[str, Any] = {"low_rank": 3, "full": "full"}
ALL, SOME = (0, 1, 2, 3), (1, 3)
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=sorted(FORMS))
def rank(request: pytest.FixtureRequest) -> Any:
    return FORMS[request.param]


def adapters_of(model: Any, indices: Sequence[int], rank: Any, **settings: Any) -> ExpertAdapters:
    experts = find_experts(model)
    return ExpertAdapters(experts, {e.name: indices for e in experts}, rank, 6.0, **settings)


def disturb(adapters: ExpertAdapters) -> None:
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def without_jitter(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.router_jitter_noise = 0.0


def materialise(model: Any, adapters: ExpertAdapters) -> Any:
    """Return a copy of the base whose fused tensors hold what the adapters compute with."""
    merged = copy.deepcopy(model)
    for experts, layer in zip(find_experts(merged), adapters, strict=True):
        for index in layer.indices:
            write(experts, index, layer[str(index)])
    return merged


def write(experts: LayerExperts, index: int, adapter: Any) -> None:
    for name, tensor in experts.expert(index).items():
        if hasattr(adapter, name):
            tensor.copy_(getattr(adapter, name).data)
        elif hasattr(adapter, f"{name}_lora_A"):
            delta = 2.0 * getattr(adapter, f"{name}_lora_B").data @ getattr(adapter, f"{name}_lora_A").data
            tensor.add_(delta.T if experts.is_transposed else delta)
        if isinstance(experts, FlatExperts) and name == "up":  # a copy of two matrices' rows
            for stored, rows in zip(("w1", "v1"), tensor.chunk(2), strict=True):
                getattr(experts.module.mlp, stored).view(experts.num_experts, *rows.shape)[index] = rows


@pytest.mark.parametrize("indices", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_untrained_adapters_compute_the_base(
    family: str, rank: Any, indices: Sequence[int], implementation: str, ids: torch.Tensor
) -> None:
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    before = logits(model, ids)
    adapters_of(model, indices, rank).attach()
    torch.testing.assert_close(logits(model, ids), before, rtol=2e-5, atol=2e-6)


def test_untrained_adapters_on_all_experts_are_the_eager_loop_bit_for_bit(rank: Any, ids: torch.Tensor) -> None:
    model = tiny_model("qwen2_moe")
    model.set_experts_implementation("eager")
    before = logits(model, ids)
    adapters_of(model, ALL, rank).attach()
    assert torch.equal(logits(model, ids), before)


def test_bf16_base_keeps_its_type_and_its_logits(family: str, rank: Any, ids: torch.Tensor) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    model.set_experts_implementation("eager")
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    index, weights = torch.tensor([[1, 2]]).expand(9, 2), torch.tensor([[0.6, 0.3]]).expand(9, 2).bfloat16()
    for experts in find_experts(model):
        before = experts.module(hidden, index, weights)
        adapters = ExpertAdapters([experts], {experts.name: ALL}, rank).attach()
        after = experts.module(hidden, index, weights)
        adapters.detach()
        assert after.dtype == torch.bfloat16
        torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("indices", [ALL, SOME], ids=["all", "some"])
def test_adapters_equal_materialised_weights(
    family: str, rank: Any, indices: Sequence[int], ids: torch.Tensor
) -> None:
    model = tiny_model(family)
    before = logits(model, ids)
    adapters = adapters_of(model, indices, rank)
    disturb(adapters)
    merged = materialise(model, adapters)
    adapters.attach()
    torch.testing.assert_close(logits(model, ids), logits(merged, ids), **CLOSE)
    assert not torch.allclose(logits(model, ids), before, **CLOSE)


def test_one_changed_expert_changes_the_logits(family: str, rank: Any, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    adapters = adapters_of(model, SOME, rank).attach()
    before = logits(model, ids)
    for name, parameter in adapters.named_parameters():
        if ".1." in name and name.endswith(("down_lora_B", ".down")):
            parameter.data += 1.0
    assert not torch.allclose(logits(model, ids), before)


def test_names_are_layer_expert_parameter(rank: Any) -> None:
    adapters = adapters_of(tiny_model(), SOME, rank)
    own = {"up", "down"} if rank == "full" else {f"{m}_lora_{f}" for m in ("up", "down") for f in "AB"}
    layers = [f"layers.model/layers/{i}/mlp/experts" for i in (0, 1)]
    assert {n for n, _ in adapters.named_parameters()} == {
        f"{n}.{e}.{p}" for n in layers for e in SOME for p in own
    }
    assert adapters.choice == {f"model.layers.{i}.mlp.experts": SOME for i in (0, 1)}


def test_gradients_reach_every_adapter_that_was_hit_and_nothing_frozen(
    family: str, rank: Any, ids: torch.Tensor
) -> None:
    model = tiny_model(family)
    adapters = adapters_of(model, ALL, rank).attach()
    disturb(adapters)
    hit = record_hits(adapters)
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in adapters:
        for index in layer.indices:
            for parameter in layer[str(index)].parameters():
                reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
                assert reached == (index in hit[layer.experts.name])
    assert all(p.grad is None for p in model.parameters())


def record_hits(adapters: ExpertAdapters) -> dict[str, set[int]]:
    hit: dict[str, set[int]] = {}
    for layer in adapters:
        layer.experts.module.register_forward_pre_hook(
            lambda _m, args, name=layer.experts.name: hit.update({name: set(args[1].flatten().tolist())})
        )
    return hit


def test_restricted_layer_equals_a_loop_over_tokens(family: str, rank: Any) -> None:
    model = tiny_model(family)
    experts = find_experts(model)[0]
    adapters = ExpertAdapters([experts], {experts.name: SOME}, rank, 6.0, restrict=True)
    disturb(adapters)
    hidden = torch.randn(4, experts.width, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[1, 3], [0, 1], [3, 2], [2, 0]])
    weights = torch.tensor([[0.5, 0.2], [0.6, 0.3], [0.1, 0.4], [0.7, 0.2]])
    used = torch.tensor([[0.5, 0.2], [0.0, 0.9], [0.5, 0.0], [0.0, 0.0]])
    expert: Any = next(iter(adapters))
    with torch.no_grad():
        rows = [
            sum(
                (used[t, k] * expert[str(int(index[t, k]))](hidden[t : t + 1])[0] for k in (0, 1) if used[t, k]),
                ZERO,
            )
            for t in range(4)
        ]
        adapters.attach()
        output = experts.module(hidden, index, weights)
    torch.testing.assert_close(output[:3], torch.stack(rows[:3]), **CLOSE)
    assert torch.equal(output[3], torch.zeros(experts.width))


ZERO = torch.zeros(())


def test_restricted_to_all_experts_changes_no_weight(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    adapters = adapters_of(model, ALL, 2).attach()
    free = logits(model, ids)
    adapters.restrict = True
    assert torch.equal(logits(model, ids), free)


def test_restricted_model_trains_without_nan(family: str, rank: Any, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    adapters = adapters_of(model, (2,), rank, restrict=True).attach()
    disturb(adapters)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in adapters.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


def test_gradient_for_names_the_experts_that_learn(family: str, rank: Any, ids: torch.Tensor) -> None:
    model = tiny_model(family).train()
    without_jitter(model)
    adapters = adapters_of(model, ALL, rank).attach()
    disturb(adapters)
    plain = model(input_ids=ids).logits.detach()
    adapters.gradient_for = lambda experts, index, weights: {int(index[0, 0])} if weights.numel() else set()
    chosen: dict[str, int] = {}
    for layer in adapters:
        layer.experts.module.register_forward_pre_hook(
            lambda _m, args, name=layer.experts.name: chosen.update({name: int(args[1][0, 0])})
        )
    output = model(input_ids=ids, labels=ids)
    assert torch.equal(output.logits, plain)
    output.loss.backward()
    for layer in adapters:
        for index in layer.indices:
            reached = {p.grad is not None for p in layer[str(index)].parameters()}
            assert reached == {index == chosen[layer.experts.name]}


def test_gradient_for_is_not_asked_in_evaluation(ids: torch.Tensor) -> None:
    model = tiny_model()

    def refuse(*_: Any) -> set[int]:
        raise AssertionError

    adapters_of(model, ALL, 2, gradient_for=refuse).attach()
    logits(model, ids)
    with pytest.raises(AssertionError):
        logits(model.train(), ids)


@pytest.mark.parametrize("restrict", [False, True], ids=["free", "restricted"])
def test_cached_generation_equals_uncached(family: str, rank: Any, restrict: bool, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    adapters = adapters_of(model, SOME, rank, restrict=restrict).attach()
    disturb(adapters)
    answers = [
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=258, eos_token_id=None
            ),
        )
        for cached in (True, False)
    ]
    assert torch.equal(*answers)


def test_detach_restores_the_base_bit_for_bit(family: str, rank: Any, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    before, weights = logits(model, ids), {n: t.clone() for n, t in model.state_dict().items()}
    adapters = adapters_of(model, SOME, rank).attach()
    disturb(adapters)
    assert model.state_dict().keys() == weights.keys()
    with adapters.disabled():
        assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(model, ids), before)
    adapters.detach()
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_adapters_and_grafts_work_on_one_module_in_any_order(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    experts = find_experts(model)
    before = logits(model, ids)
    adapters = adapters_of(model, SOME, 2)
    disturb(adapters)
    grafts = Grafts(experts, {e.name: (0,) for e in experts}, rank=2)
    results = []
    for parts in ([adapters, grafts], [grafts, adapters]):
        for part in parts:
            part.attach()
        results.append(logits(model, ids))
        for part in parts:
            part.detach()
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(*results)


def test_gradient_checkpointing_changes_no_gradient(family: str, rank: Any, ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family).train()
        without_jitter(model)
        adapters = adapters_of(model, SOME, rank).attach()
        adapters.gradient_for = lambda _experts, _index, weights: {1} if weights.numel() else set()
        disturb(adapters)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapters.parameters()])
    assert any(g is not None for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        torch.testing.assert_close(plain if plain is not None else ZERO, recomputed if plain is not None else ZERO)


def test_autocast_trains_in_bf16(family: str, rank: Any, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    adapters = adapters_of(model, SOME, rank).attach()
    disturb(adapters)
    full = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    # Rounding may send single tokens to other experts, so the whole is compared and not each number.
    assert (output.logits.float() - full).norm() < 0.2 * full.norm()


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model()
    experts = find_experts(model)
    with pytest.raises(GraftError, match="choice names \\['elsewhere'\\]"):
        ExpertAdapters(experts, {"elsewhere": [0]})
    for wrong in ([], [0, 0], [4]):
        with pytest.raises(GraftError, match="different numbers from 0 to 3"):
            ExpertAdapters(experts, {experts[0].name: wrong})
    first = ExpertAdapters(experts[1:], {experts[1].name: [0]}, 2).attach()
    second = ExpertAdapters(experts, {e.name: [0] for e in experts}, 2)
    with pytest.raises(GraftError, match="adapted already"):
        second.attach()
    first.detach()
    second.attach().detach()
    assert not any("forward" in vars(module) for module in model.modules())
