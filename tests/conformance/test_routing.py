"""Routing of every family: against plain hooks, the router's own logits, and rows without padding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import Example
from flexperts.errors import ModelError
from flexperts.modeling import routing
from flexperts.modeling.recording import record
from flexperts.modeling.routing import LayerRouting, record_routing, summarize_routing
from flexperts.moe.experts import find_experts
from flexperts.moe.router import find_router
from flexperts.parts.grafts import Grafts, OpeningRecorder
from flexperts.parts.router_deltas import RouterDeltas
from flexperts.testing import tiny_model

LENGTHS = (9, 4, 7)
SOFTMAX_WEIGHTS = {"olmoe", "qwen2_moe", "qwen3_moe"}
"""Families whose weights are the softmax's values themselves."""
SCALED_WEIGHTS = {"gpt_oss", "granitemoe", "mixtral"}
"""Families whose weights are these, scaled to sum 1."""


def examples() -> list[Example]:
    stream = torch.Generator().manual_seed(3)
    return [Example(tuple(torch.randint(0, 250, (n,), generator=stream).tolist()), n) for n in LENGTHS]


def batch() -> PaddedBatch:
    return pad_batch(examples(), 258)


def recorded(model: Any, *batches: PaddedBatch, precision: Any = "fp32") -> dict[str, LayerRouting]:
    return record_routing(model, find_experts(model), batches or [batch()], precision)


@contextmanager
def plain_hooks(model: Any) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Note, by experts module: index and weights as the experts get them, the router's input and its output."""
    seen: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as stack:
        for e in find_experts(model):
            note = seen[e.name] = {}
            handles = [
                *e.watch(lambda _x, index, weight, _y, note=note: note.update(index=index, weight=weight)),
                *router_hooks(model, e, note),
            ]
            for handle in handles:
                stack.callback(handle.remove)
        yield seen


def router_hooks(model: Any, experts: Any, note: dict[str, Tensor]) -> list[Any]:
    try:
        router = find_router(model, experts).module
    except ModelError:
        return []

    def scored(_module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        first = next(t for t in (output if isinstance(output, tuple) else (output,)) if t.is_floating_point())
        note.update(input=args[0], logits=first)

    return [router.register_forward_hook(scored)]


def run(model: Any, *, precision: str = "fp32") -> dict[str, dict[str, Tensor]]:
    """Return what plain hooks see of the tokens, padding left out."""
    rows = batch()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with plain_hooks(model) as seen, torch.no_grad(), autocast:
        model(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
    keep = rows.attention_mask.bool().flatten()
    return {name: {k: t.reshape(len(keep), -1)[keep] for k, t in note.items()} for name, note in seen.items()}


def test_index_and_weights_are_what_the_experts_get(model: Any) -> None:
    layers, seen = recorded(model), run(model)
    assert list(layers) == list(seen) == [e.name for e in find_experts(model)]
    for name, layer in layers.items():
        assert len(layer.index) == sum(LENGTHS)
        assert torch.equal(layer.index, seen[name]["index"])
        assert torch.equal(layer.weight, seen[name]["weight"].float())
        assert layer.experts == 4


def test_the_distribution_is_that_of_the_routers_own_logits(family: str) -> None:
    model = tiny_model(family)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "correction_bias" in name or "expert_bias" in name:
            tensor.zero_()  # what corrects the choice is not in the distribution
    layers, seen = recorded(model), run(model)
    for name, layer in layers.items():
        assert layer.probabilities is not None
        torch.testing.assert_close(layer.probabilities, seen[name]["logits"].float().softmax(-1))
        chosen = layer.probabilities.topk(layer.index.shape[1]).indices
        assert torch.equal(chosen.sort(-1).values, layer.index.sort(-1).values)
        given = layer.probabilities.gather(1, layer.index)
        if family in SCALED_WEIGHTS:
            given = given / given.sum(1, keepdim=True)
        if family in SCALED_WEIGHTS | SOFTMAX_WEIGHTS:
            torch.testing.assert_close(layer.weight, given)


def test_under_autocast_the_distribution_is_still_computed_in_fp32(model: Any) -> None:
    layers, seen = recorded(model, precision="bf16"), run(model, precision="bf16")
    for e in find_experts(model):
        router = find_router(model, e).module
        logits = seen[e.name]["input"].double() @ router.weight.double().T
        if (bias := getattr(router, "bias", None)) is not None:
            logits = logits + bias.double()
        probabilities = layers[e.name].probabilities
        assert probabilities is not None
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.double(), logits.softmax(-1), rtol=1e-4, atol=1e-6)
        assert torch.equal(layers[e.name].index, seen[e.name]["index"])


def test_padding_changes_no_weight_and_no_choice(family: str) -> None:
    """Every token of a padded batch is sent where it is sent in a batch of its own, with the same weights."""
    model = tiny_model(family)
    padded = recorded(model)
    alone = recorded(model, *(pad_batch([example], 258) for example in examples()))
    for name, layer in padded.items():
        order, expected = layer.index.argsort(-1), alone[name].index.argsort(-1)
        assert torch.equal(layer.index.gather(1, order), alone[name].index.gather(1, expected))
        torch.testing.assert_close(
            layer.weight.gather(1, order), alone[name].weight.gather(1, expected), rtol=1e-3, atol=1e-6
        )


def test_padding_does_not_count(family: str) -> None:
    """A padded batch gives what its rows give one by one."""
    model = tiny_model(family)
    padded = recorded(model)
    alone = recorded(model, *(pad_batch([example], 258) for example in examples()))
    for name, layer in padded.items():
        assert torch.equal(layer.index.sort(-1).values, alone[name].index.sort(-1).values)
        numbers, expected = summarize_routing(layer, alone[name]), summarize_routing(alone[name])
        assert numbers["tokens"] == expected["tokens"] == sum(LENGTHS)
        for key in ("utilisation", "co_selection", "dead", "load_entropy"):
            assert numbers[key] == expected[key]
        assert numbers["mean_weight"] == pytest.approx(expected["mean_weight"], rel=1e-4)
        assert numbers["entropy"] == pytest.approx(expected["entropy"], rel=1e-4)
        assert numbers["agreement"] == 1
        assert numbers["divergence"] < 1e-8


def test_the_base_agrees_with_itself(model: Any) -> None:
    first, second = recorded(model), recorded(model)
    for name, layer in first.items():
        numbers = summarize_routing(layer, second[name])
        assert (numbers["agreement"], numbers["divergence"], numbers["utilisation_divergence"]) == (1, 0, 0)
        assert sum(numbers["utilisation"]) == pytest.approx(1, abs=1e-5)


def test_moved_attention_moves_routing_under_frozen_routers(family: str) -> None:
    model = tiny_model(family)
    before = recorded(model)
    moved = copy.deepcopy(model)
    for name, parameter in moved.named_parameters():
        if "self_attn" in name:
            parameter.mul_(3)
    for name, layer in recorded(moved).items():
        now, then = (r.probabilities.double().numpy() for r in (layer, before[name]))  # type: ignore[union-attr]
        same = [
            len({*a} & {*b}) / 2 for a, b in zip(layer.index.tolist(), before[name].index.tolist(), strict=True)
        ]
        numbers = summarize_routing(layer, before[name])
        assert numbers["divergence"] == pytest.approx((jensenshannon(now, then, axis=1) ** 2).mean(), rel=1e-4)
        assert numbers["divergence"] > 1e-6
        assert numbers["agreement"] == pytest.approx(sum(same) / len(same), rel=1e-5)


def test_a_trained_router_is_the_one_that_is_read(family: str) -> None:
    model = tiny_model(family)
    deltas, changed = RouterDeltas(model, find_experts(model)), copy.deepcopy(model)
    with torch.no_grad():
        for delta in deltas.parameters():
            delta.normal_(generator=torch.Generator().manual_seed(5))
        for e, delta in zip(find_experts(changed), deltas.parameters(), strict=True):
            find_router(changed, e).weight[: e.num_experts].add_(delta)
    before = recorded(model)
    deltas.attach()
    after, expected = recorded(model), recorded(changed)
    for name, layer in after.items():
        torch.testing.assert_close(vars(layer), vars(expected[name]))
        assert not torch.equal(layer.probabilities, before[name].probabilities)  # type: ignore[arg-type]


def test_a_correction_bias_moves_the_choice_and_not_the_distribution() -> None:
    """A choice that the softmax alone would not make is recorded as it was made."""
    model = tiny_model("deepseek_v3")
    before = recorded(model)
    first, *_ = find_experts(model)
    find_router(model, first).module.e_score_correction_bias[3] = 10.0
    after = recorded(model)
    assert (after[first.name].index == 3).any(1).all()
    assert not (before[first.name].index == 3).any(1).all()
    assert torch.equal(after[first.name].probabilities, before[first.name].probabilities)  # type: ignore[arg-type]
    assert summarize_routing(after[first.name])["co_selection"][3][3] == 1


def test_an_unknown_router_leaves_index_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("no router", "one is needed", "none")

    model = tiny_model()
    whole = recorded(model)
    monkeypatch.setattr(routing, "find_router", refuse)
    for name, layer in recorded(model).items():
        assert layer.probabilities is None
        assert torch.equal(layer.index, whole[name].index)
        assert summarize_routing(layer, whole[name])["divergence"] is None


def test_nothing_is_left_on_the_model_even_after_an_error(family: str) -> None:
    model = tiny_model(family)
    recorded(model)
    last = find_experts(model)[-1].module
    last.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recorded(model)
    last._forward_hooks.clear()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_method_sees_every_batch_first_and_its_own_passes_are_not_recorded() -> None:
    model, order = tiny_model(), []

    def on_batch(given: PaddedBatch) -> None:
        order.append(len(given.input_ids))
        model(input_ids=given.input_ids)

    batches = [pad_batch(examples()[:1], 258), pad_batch(examples()[1:], 258)]
    layers = record_routing(model, find_experts(model), batches, "fp32", on_batch)
    assert order == [1, 2]
    assert all(len(layer.index) == sum(LENGTHS) for layer in layers.values())


def openings(model: Any, grafts: Grafts) -> dict[str, tuple[list[float], list[float]]]:
    recorder = OpeningRecorder(grafts)
    record(model, [recorder], [batch()], "fp32")
    return recorder.result()


def grafted(model: Any, bias: float = 0.0) -> Grafts:
    experts = find_experts(model)
    return Grafts(experts, {e.name: (0, 2) for e in experts}, rank=2, gate_bias=bias).attach()


def test_an_untrained_gate_opens_by_its_bias(model: Any) -> None:
    expected = 1 / (1 + torch.tensor(2.0).exp().item())
    found = openings(model, grafted(model, -2.0))
    assert list(found) == [e.name for e in find_experts(model)]
    for mean, std in found.values():
        assert mean == pytest.approx([expected] * 2, rel=4e-3)  # one step of bf16
        assert std == [0.0, 0.0]


def test_a_trained_gates_opening_is_a_mean_over_tokens_without_padding(family: str) -> None:
    model = tiny_model(family)
    grafts, hidden = grafted(model, -1.0), {}
    for graft in grafts:
        graft.graft_gate_weight.data.normal_(generator=torch.Generator().manual_seed(7))
        graft.experts.module.register_forward_pre_hook(
            lambda _m, args, name=graft.experts.name: hidden.update({name: args[0]})
        )
    found, keep = openings(model, grafts), batch().attention_mask.bool().flatten()
    for graft in grafts:
        tokens = hidden[graft.experts.name].reshape(len(keep), -1)[keep].double().numpy()
        logits = tokens @ graft.graft_gate_weight.detach().double().numpy().T - 1.0
        by_hand = torch.from_numpy(logits).sigmoid().numpy()
        mean, std = found[graft.experts.name]
        assert mean == pytest.approx(by_hand.mean(0), rel=1e-4)
        assert std == pytest.approx(by_hand.std(0), rel=1e-3)
        assert min(std) > 0


def test_a_disabled_graft_has_no_opening_and_no_hook_stays() -> None:
    model = tiny_model()
    grafts = grafted(model)
    with grafts.disabled():
        assert openings(model, grafts) == {}
    assert openings(model, grafts)
    assert not any(m._forward_pre_hooks for m in [*model.modules(), *grafts.modules()])
