"""What methods hang onto a model, on the layouts of routed experts that are not the fused one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.errors import GraftError
from flexperts.modeling.recording import mean_inputs
from flexperts.modeling.routing import record_routing, summarize_routing
from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts
from flexperts.moe.layout import LayerExperts
from flexperts.moe.router import find_router
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.gated_adapters import GatedAdapters
from flexperts.parts.router_deltas import RouterDeltas
from flexperts.testing import tiny_model

IDS = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))
EXPERTS_OF_LONGCAT = 4


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_routing_is_recorded(family: str, model: Any) -> None:
    rows = pad_batch([Example(tuple(r.tolist()), 4) for r in IDS] + [Example((1, 2), 1)], 258)
    experts = find_experts(model)
    layers = record_routing(model, experts, [rows], "fp32")
    assert list(layers) == [e.name for e in experts]
    for layer in layers.values():
        assert layer.index.shape == layer.weight.shape == (29, 2)
        # Longcat's router reads its matrix and never calls the module that holds it.
        assert (layer.probabilities is None) is (family == "longcat_flash")
        numbers = summarize_routing(layer)
        assert len(numbers["utilisation"]) == 4
        assert sum(numbers["utilisation"]) == pytest.approx(1, abs=1e-4)


def test_a_delta_on_the_router_changes_its_choice(model: Any) -> None:
    experts, before = find_experts(model), logits(model)
    deltas = RouterDeltas(model, experts).attach()
    for e in experts:
        assert find_router(model, e).weight.shape == (e.num_experts + e.num_identities, 32)
    assert torch.equal(logits(model), before)
    for e, delta in zip(experts, deltas.parameters(), strict=True):
        frozen = find_router(model, e).weight.clone()
        assert delta.shape == deltas.weight(e.name).shape == (4, 32)
        nn.init.normal_(delta, std=0.5)
        torch.testing.assert_close(find_router(model, e).weight[:4], frozen[:4] + delta)
        assert torch.equal(find_router(model, e).weight[4:], frozen[4:])
    assert not torch.equal(logits(model), before)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(d.grad is not None and d.grad.abs().sum() > 0 for d in deltas.parameters())
    deltas.detach()
    assert torch.equal(logits(model), before)


def test_gated_pairs_hang_beside_every_layout(model: Any) -> None:
    experts, before = find_experts(model), logits(model)
    pairs = GatedAdapters(experts, rank=2, generator=torch.Generator().manual_seed(0)).attach()
    assert torch.equal(logits(model), before)
    for pair in pairs:
        nn.init.normal_(pair.shared.up, std=0.1)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash"])
@pytest.mark.parametrize("indices", [(1,), (0, 1, 2, 3)])
def test_untrained_adapters_in_place_are_the_base(model: Any, indices: tuple[int, ...]) -> None:
    experts, before = find_experts(model), logits(model)
    adapters = ExpertAdapters(experts, {e.name: indices for e in experts}).attach()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-6)
    for layer in adapters:
        layer[str(indices[0])].down.data.zero_()
    assert (logits(model) - before).abs().max() > 1e-4
    adapters.detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["jetmoe", "llama4_text"])
def test_adapting_in_place_is_refused_where_no_module_gets_the_routing(model: Any) -> None:
    experts = find_experts(model)
    found = rf"{experts[0].name} \({type(experts[0]).__name__}\)"
    with pytest.raises(GraftError, match=found + ".*in place.*flex"):
        ExpertAdapters(experts, {experts[0].name: (0,)}, rank=2)


def test_identities_stay_when_only_chosen_experts_exist() -> None:
    """Longcat's choices from N on hand x on; restricting the experts leaves them their share."""
    model = tiny_model("longcat_flash")
    [experts, *_] = find_experts(model)
    adapters = ExpertAdapters([experts], {experts.name: (1,)}, restrict=True).attach()
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[1, 4], [0, 5], [0, 2]])
    weights = torch.tensor([[0.5, 0.3], [0.2, 0.6], [0.4, 0.4]])
    with torch.no_grad():
        output: Tensor = experts.module(hidden, index, weights)
        one = experts.run(hidden, experts.expert(1))
    torch.testing.assert_close(output[0], 0.5 * one[0] + 0.3 * hidden[0])
    torch.testing.assert_close(output[1], 0.8 * hidden[1])
    assert output[2].abs().sum() == 0
    adapters.detach()


def test_who_learns_is_asked_about_experts_only() -> None:
    model = tiny_model("longcat_flash").train()
    asked: list[tuple[Tensor, Tensor]] = []

    def note(_experts: LayerExperts, index: Tensor, weights: Tensor) -> tuple[int, ...]:
        asked.append((index, weights))
        return (0,)

    experts = find_experts(model)
    ExpertAdapters(experts, {e.name: (0,) for e in experts}, gradient_for=note).attach()
    seen = {}
    handle = next(experts[0].watch(lambda *call: seen.update(call=call)))
    model(input_ids=IDS)
    handle.remove()
    _, index, weights, _ = seen["call"]
    assert (index >= EXPERTS_OF_LONGCAT).any()
    assert all((i < EXPERTS_OF_LONGCAT).all() for i, _ in asked)
    assert torch.equal(asked[0][1], weights * (index < EXPERTS_OF_LONGCAT))


LORA = {
    "dbrx": {"Wqkv"},
    "jetmoe": {"kv_proj"},
    "llama4_text": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "longcat_flash": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}


@pytest.mark.parametrize("family", sorted(LORA))
def test_lora_finds_attention_and_no_router(family: str, model: Any) -> None:
    names = attention_linears(model)
    assert {name.rpartition(".")[2] for name in names} == LORA[family]
    routers = {find_router(model, e).name for e in find_experts(model)}
    assert not routers & set(names)
    assert not any(name.startswith(e.block) for name in names for e in find_experts(model))


class MixedAttention(nn.Module):
    """Attention beside a subclass of Linear, which may return anything."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.router = nn.Linear(4, 4), type("Router", (nn.Linear,), {})(4, 2)


def test_lora_takes_exact_linear_layers_only() -> None:
    assert attention_linears(nn.ModuleDict({"attn": MixedAttention()})) == ["attn.q_proj"]


def test_mean_inputs_of_layers_with_one_head_more_in_their_shape() -> None:
    """Longcat's kv_b_proj gets ``[B, 1, S, in]``."""
    model, seen = tiny_model("longcat_flash"), []
    rows = pad_batch([Example((1, 2, 3, 4), 2), Example((5, 6), 1)], 258)
    name = next(n for n in attention_linears(model) if n.endswith("kv_b_proj"))
    layer = model.get_submodule(name)
    means = mean_inputs(model, {name: layer}, [rows], "fp32")
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
    handle.remove()
    assert seen[0].shape[:3] == (2, 1, 4)
    torch.testing.assert_close(means[name], torch.cat([seen[0][0, 0], seen[0][1, 0, 2:]]).mean(0))
