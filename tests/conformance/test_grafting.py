"""Every family, every form of personal expert: one matrix of promises.

A row is (family, storage type, form of the personal experts). Families come from ``flexperts.testing``; which
promises are held to all of them, and which exceptions there are, stands in ``matrix.toml``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from flexperts.config.model import LoraConfig
from flexperts.errors import GraftError, ModelError
from flexperts.modeling.lora import LoraAdapters
from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts
from flexperts.moe.layout import LayerExperts
from flexperts.moe.router import expert_rows, find_router
from flexperts.parameters.store import PersonalMeta, load_personal, save_personal
from flexperts.parts.grafts import Graft, Grafts
from flexperts.testing import FAMILIES, run_expert, tiny_model

FORMS: dict[str, dict[str, Any]] = {"low_rank": {"rank": 3}, "full": {"rank": "full"}}
CLOSED = -200.0  # sigmoid underflows to exactly 0


@pytest.fixture(params=sorted(FORMS))
def form(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FORMS[request.param]


def grafts_of(model: Any, indices: tuple[int, ...] = (1,), **settings: Any) -> Grafts:
    experts = find_experts(model)
    return Grafts(experts, {e.name: indices for e in experts}, **settings)


def disturb(grafts: Grafts) -> None:
    """Move every personal parameter off its start, so that no path hides behind a zero."""
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in grafts.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(grafts: Grafts) -> Iterator[tuple[LayerExperts, Graft]]:
    for graft in grafts:
        yield graft.experts, graft


def test_closed_gate_is_the_base_bit_for_bit(model: Any, form: dict[str, Any], ids: torch.Tensor) -> None:
    before = logits(model, ids)
    grafts = grafts_of(model, **form, gate_bias=CLOSED).attach()
    assert torch.equal(logits(model, ids), before)
    for graft in grafts:
        graft.graft_gate_bias.data.zero_()
    assert not torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("implementation", ["default", "eager", "grouped_mm"])
def test_untrained_graft_at_gate_g_is_the_experts_module_run_on_that_expert(
    family: str, form: dict[str, Any], implementation: str
) -> None:
    model = tiny_model(family)
    if implementation != "default":
        model.set_experts_implementation(implementation)
    bias = 0.7
    for experts, graft in layers(grafts_of(model, (2,), **form, gate_bias=bias)):
        hidden = torch.randn(13, experts.width, generator=torch.Generator().manual_seed(1))
        opening = float(torch.sigmoid(torch.tensor(bias)))
        with torch.no_grad():
            alone = run_expert(experts, 2, hidden, opening)
            torch.testing.assert_close(graft(hidden), alone, rtol=2e-5, atol=1e-6)


def test_a_gate_from_the_router_opens_most_for_an_expert_that_the_router_chooses(
    family: str, ids: torch.Tensor
) -> None:
    """The open gate of all experts, on the states that the layer's experts get, against the model's own choices."""
    model = tiny_model(family)
    for experts in find_experts(model):
        every = tuple(range(experts.num_experts))
        rows = {experts.name: expert_rows(model, experts, every)}
        graft = next(iter(Grafts([experts], {experts.name: every}, rank=2, gate_weights=rows)))
        bias = getattr(find_router(model, experts).module, "bias", None)
        if isinstance(bias, torch.Tensor):  # gpt_oss: not part of the gate's start
            graft.graft_gate_bias.data.copy_(bias)
        calls: list[tuple[torch.Tensor, ...]] = []
        handles = list(experts.watch(lambda *call, calls=calls: calls.append(call)))
        logits(model, ids)
        for handle in handles:
            handle.remove()
        hidden, index, _, _ = calls[0]
        best = graft.opening(hidden).argmax(-1, keepdim=True)
        assert (best == index).any(-1).all()
        assert len(best.unique()) > 1


NO_ROW = {
    "inkling_text": "has no router matrix",
    "nemotron_h": "reads 32 values, .* a gate can start as the router's row only if both read the same input",
    "zaya": "has no router matrix",
}
"""Families without a router's row for the gate, and what is said."""


def test_a_gate_starts_as_the_routers_row_wherever_there_is_one() -> None:
    started = set()
    for family in FAMILIES:
        model = tiny_model(family)
        experts = find_experts(model)
        if family in NO_ROW:
            with pytest.raises(ModelError, match=rf"{NO_ROW[family]}.*set graft\.gate_start = 'constant'"):
                expert_rows(model, experts[0], (1,))
            continue
        rows = {e.name: expert_rows(model, e, (2, 0)) for e in experts}
        for graft in Grafts(experts, dict.fromkeys(rows, (2, 0)), rank=2, gate_bias=0.5, gate_weights=rows):
            router = find_router(model, graft.experts).weight
            assert torch.equal(graft.graft_gate_weight, router[[2, 0]].float())
            assert graft.graft_gate_bias.tolist() == [0.5, 0.5]
            graft.graft_gate_weight.data.zero_()
            assert router.abs().sum() > 0  # the gate is a copy
            started.add(family)
    assert started == FAMILIES.keys() - NO_ROW.keys()
    assert len(started) > 50


def test_a_silent_graft_is_the_base_until_it_has_learnt(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, ids)
    grafts = grafts_of(model, (0, 2), gate_bias=1.0, silent=True).attach()
    assert torch.equal(logits(model, ids), before)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for _, graft in layers(grafts):
            for expert in graft.personal:
                assert expert.up.abs().sum() > 0
                assert expert.down.grad.abs().sum() > 0
                expert.down -= expert.down.grad / expert.down.grad.abs().max()
    assert not torch.equal(logits(model, ids), before)


def test_a_low_rank_expert_cannot_start_silent() -> None:
    with pytest.raises(GraftError, match="cannot start silent"):
        grafts_of(tiny_model("qwen2_moe"), rank=2, silent=True)


def test_a_difference_is_the_base_until_it_has_learnt(model: Any, form: dict[str, Any], ids: torch.Tensor) -> None:
    before = logits(model, ids)
    grafts = grafts_of(model, (0, 2), **form, gate_bias=1.0, difference=True).attach()
    assert torch.equal(logits(model, ids), before)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for _, graft in layers(grafts):
            for expert in graft.personal:
                last = expert.down if form["rank"] == "full" else expert.down_lora_B
                last -= last.grad / last.grad.abs().max()
    assert not torch.equal(logits(model, ids), before)


def test_a_difference_adds_the_gated_change_of_each_expert(family: str, form: dict[str, Any]) -> None:
    """sum_p c_p g_p(x) (E_p(x) - E_s(x)), with E_s(x) from the experts module itself."""
    model = tiny_model(family)
    scales = {e.name: (0.5, 2.0) for e in find_experts(model)}
    ours = grafts_of(model, (3, 1), **form, scales=scales, difference=True)
    plain = grafts_of(model, (3, 1), **form, scales=scales)
    disturb(ours)
    plain.load_state_dict(ours.state_dict())
    for (experts, graft), (_, whole) in zip(layers(ours), layers(plain), strict=True):
        hidden = torch.randn(13, experts.width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            gates = graft.opening(hidden)
            frozen = [
                c * gates[:, p, None] * run_expert(experts, i, hidden, 1.0)
                for p, (c, i) in enumerate(((0.5, 3), (2.0, 1)))
            ]
            torch.testing.assert_close(graft(hidden), whole(hidden) - sum(frozen), rtol=2e-4, atol=1e-5)
            assert graft(hidden).abs().max() > 1e-3


def test_a_difference_with_a_silent_start_is_refused() -> None:
    with pytest.raises(GraftError, match="would not be zero"):
        grafts_of(tiny_model("qwen2_moe"), silent=True, difference=True)


def test_k_experts_add_up(family: str, form: dict[str, Any]) -> None:
    model = tiny_model(family)
    experts = find_experts(model)[0]
    hidden = torch.randn(7, experts.width, generator=torch.Generator().manual_seed(2))
    alone = [Graft(experts, (i,), form["rank"], 8.0, 0.3, torch.Generator().manual_seed(0)) for i in (3, 0)]
    together = Graft(experts, (3, 0), form["rank"], 8.0, 0.3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(together(hidden), alone[0](hidden) + alone[1](hidden))


def test_scales_multiply_each_experts_term(family: str, form: dict[str, Any]) -> None:
    experts = find_experts(tiny_model(family))[0]
    hidden = torch.randn(7, experts.width, generator=torch.Generator().manual_seed(2))

    def graft(indices: tuple[int, ...], scales: tuple[float, ...] | None = None) -> torch.Tensor:
        with torch.no_grad():
            return Graft(experts, indices, form["rank"], 8.0, 0.3, torch.Generator(), scales)(hidden)

    expected = 0.25 * graft((3,)) - 1.5 * graft((0,))
    torch.testing.assert_close(graft((3, 0), (0.25, -1.5)), expected)
    assert torch.equal(graft((3, 0), (1.0, 1)), graft((3, 0)))


def test_scales_are_given_by_module(ids: torch.Tensor) -> None:
    model = tiny_model()
    first, second = (e.name for e in find_experts(model))
    before = logits(model, ids)
    plain = grafts_of(model).attach()
    grafted = logits(model, ids)
    plain.detach()
    scaled = grafts_of(model, scales={second: (0.5,)}).attach()
    assert scaled.scales == {first: (1.0,), second: (0.5,)}
    assert not torch.equal(logits(model, ids), grafted)
    scaled.detach()
    with grafts_of(model, scales={first: [1], second: [1.0]}).attach().disabled():
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), grafted)


@pytest.mark.parametrize("scales", [(), (1.0, 2.0), (float("nan"),), (float("inf"),)])
def test_scales_that_do_not_fit_are_refused(scales: tuple[float, ...]) -> None:
    model = tiny_model()
    experts = find_experts(model)
    with pytest.raises(GraftError, match="one finite number for each personal expert, 1 in all"):
        grafts_of(model, scales={experts[0].name: scales})
    with pytest.raises(GraftError, match="scales name"):
        Grafts(experts, {experts[0].name: (1,)}, scales={experts[1].name: (1.0,)})


def test_low_rank_delta_in_activations_equals_the_delta_in_weights(family: str) -> None:
    """W x + s B (A x) must be (W + s B A) x, in the layout and through the activation of each family."""
    model = tiny_model(family)
    grafts = grafts_of(model, rank=3, alpha=6.0)
    disturb(grafts)
    for experts, graft in layers(grafts):
        expert: Any = graft.personal[0]
        hidden = torch.randn(5, experts.width, generator=torch.Generator().manual_seed(3))
        frozen = dict(expert.frozen.items())
        for name in ("up", "down"):
            delta = 2.0 * getattr(expert, f"{name}_lora_B") @ getattr(expert, f"{name}_lora_A")
            frozen[name] = frozen[name] + (delta.T if experts.is_transposed else delta)
        with torch.no_grad():
            merged = experts.run(hidden, type(expert.frozen)(**frozen))
            torch.testing.assert_close(expert(hidden), merged, rtol=1e-4, atol=1e-5)


def test_frozen_expert_is_read_in_place(model: Any) -> None:
    for experts, graft in layers(grafts_of(model, (3,), rank=2)):
        expert: Any = graft.personal[0]
        storages = {parameter.untyped_storage().data_ptr() for parameter in experts.stored}
        for tensor in (expert.frozen.up, expert.frozen.down):
            assert tensor.untyped_storage().data_ptr() in storages
        own = sum(p.numel() for p in expert.parameters())
        assert own < expert.frozen.up.numel()


def test_gradients_reach_gate_and_personal_experts_and_nothing_frozen(
    model: Any, form: dict[str, Any], ids: torch.Tensor
) -> None:
    grafts = grafts_of(model, (0, 2), **form).attach()
    disturb(grafts)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for name, parameter in grafts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters())


def test_no_gradient_enters_the_base_through_the_graft_even_if_it_asks(family: str, form: dict[str, Any]) -> None:
    model = tiny_model(family).requires_grad_(True)
    grafts = grafts_of(model, **form)
    disturb(grafts)
    for experts, graft in layers(grafts):
        graft(torch.randn(4, experts.width)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_cached_generation_equals_uncached(model: Any, form: dict[str, Any], ids: torch.Tensor) -> None:
    grafts = grafts_of(model, **form).attach()
    disturb(grafts)
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
    assert answers[0].shape == (2, 17)
    assert torch.equal(*answers)


def test_personal_state_round_trip_is_bit_equal(
    model: Any, form: dict[str, Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    grafts = grafts_of(model, **form).attach()
    disturb(grafts)
    expected = logits(model, ids)
    meta = PersonalMeta("a", "base", 1, "hash", grafts.choice, {})
    save_personal(tmp_path / "a.safetensors", dict(grafts.named_parameters()), meta)
    grafts.detach()

    tensors, read = load_personal(tmp_path / "a.safetensors", base="base")
    again = grafts_of(model, read.choice[grafts_names(grafts)[0]], **form).attach()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(tensors[name])
    assert read == meta
    assert torch.equal(logits(model, ids), expected)


def grafts_names(grafts: Grafts) -> list[str]:
    return list(grafts.choice)


def test_detach_restores_the_base(model: Any, form: dict[str, Any], ids: torch.Tensor, tmp_path: Path) -> None:
    before, weights = logits(model, ids), {n: t.clone() for n, t in model.state_dict().items()}
    grafts = grafts_of(model, **form).attach()
    disturb(grafts)
    assert model.state_dict().keys() == weights.keys()
    with grafts.disabled():
        assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(model, ids), before)
    grafts.detach()
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_saving_with_grafts_attached_saves_the_base(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = logits(model, ids)
    grafts = grafts_of(model, rank=2).attach()
    disturb(grafts)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(reloaded, ids), before, rtol=0, atol=0)


def test_gradient_checkpointing_changes_no_gradient(family: str, form: dict[str, Any], ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family)
        grafts = grafts_of(model, **form).attach()
        disturb(grafts)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
            for module in model.modules():
                if hasattr(module, "router_jitter_noise"):
                    module.router_jitter_noise = 0.0
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in grafts.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_lora_targets_are_exact_attention_linears(family: str) -> None:
    model = tiny_model(family)
    inside = tuple(f"{e.name}." for e in find_experts(model))
    names = attention_linears(model)
    assert names
    for name in names:
        assert type(model.get_submodule(name)) is nn.Linear
        assert not name.startswith(inside)
        assert not {"mlp", "router", "gate", "experts", "shared_experts"} & set(name.split("."))


def test_one_step_of_lora_and_grafts_lowers_the_loss(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    lora = LoraAdapters(model, LoraConfig(rank=2, alpha=4, projections=()), seed=0)
    grafts = grafts_of(model, rank=2).attach()
    learnt = {**lora.parameters(), **dict(grafts.named_parameters())}
    before = lora.model(input_ids=ids, labels=ids).loss
    before.backward()
    silent = [name for name, p in learnt.items() if p.grad is None or not p.grad.any()]
    # Both kinds of B start at zero, so that no gradient reaches an A yet.
    assert [name for name in silent if not name.endswith(("lora_A.weight", "lora_A"))] == []
    with torch.no_grad():
        length = torch.stack([p.grad.norm() for p in learnt.values() if p.grad is not None]).norm()
        for parameter in learnt.values():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / length
    after = lora.model(input_ids=ids, labels=ids).loss
    assert before - after > 0.02 * length
