"""Selection against a reference that stores everything and loops over everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from flexperts.config.model import GraftConfig
from flexperts.errors import GraftError
from flexperts.moe import fused
from flexperts.moe.experts import find_experts
from flexperts.selection import selection
from flexperts.selection.rules import RULES, coefficients, select, subset_error
from flexperts.selection.selection import CalibrationSettings, LayerScores, reconstruction_scores, score_experts
from flexperts.testing import run_expert, tiny_model

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]])


def tokens() -> torch.Tensor:
    return torch.randint(0, 250, MASK.shape, generator=torch.Generator().manual_seed(7))


def brute_force(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Store every module's inputs and outputs, then run its own forward on one expert at weight 1."""
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    with watched(model, seen), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    return [_errors(e, seen[e.name], mask.bool().reshape(-1)) for e in find_experts(model)]


@contextmanager
def watched(model: Any, seen: dict[str, tuple[torch.Tensor, ...]]) -> Iterator[None]:
    """Note every experts module's last call as (x, index, weights, output)."""
    with ExitStack() as stack:
        for e in find_experts(model):
            for handle in e.watch(lambda *call, name=e.name: seen.update({name: call})):
                stack.callback(handle.remove)
        yield


def _errors(experts: Any, call: tuple[torch.Tensor, ...], keep: torch.Tensor) -> torch.Tensor:
    hidden, _, _, output = (t[keep] for t in call)
    with torch.no_grad():
        runs = [run_expert(experts, e, hidden) for e in range(4)]
    return torch.stack([(output - run).double().square().sum() for run in runs])


def test_scores_equal_brute_force_without_padding(family: str) -> None:
    model, ids = tiny_model(family), tokens()
    batches = [{"input_ids": ids, "attention_mask": MASK}]
    layers = reconstruction_scores(
        lambda batch: model(**batch), find_experts(model), batches, max_tokens=10**6, generator=torch.Generator()
    )
    expected = brute_force(model, ids, MASK)
    assert len(layers) == len(expected) == 2
    for layer, errors in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.errors, errors, rtol=1e-4, atol=1e-9)
        assert layer.best(1) == (int(errors.argmin()),)
        assert layer.best(3) == tuple(errors.argsort()[:3].tolist())
        assert layer.tokens == int(MASK.sum())


def test_batching_does_not_change_the_sums() -> None:
    model, ids = tiny_model(), tokens()
    whole = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    rows = [{"input_ids": i[None], "attention_mask": torch.ones_like(i[None])} for i in ids]
    one, many = (
        reconstruction_scores(
            lambda b: model(**b), find_experts(model), batches, max_tokens=10**6, generator=torch.Generator()
        )
        for batches in (whole, rows)
    )
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a.errors, b.errors, rtol=1e-5, atol=0)


def scores(model: Any, *, pairs: bool = True) -> list[LayerScores]:
    batches = [{"input_ids": tokens(), "attention_mask": MASK}]
    return reconstruction_scores(
        lambda b: model(**b),
        find_experts(model),
        batches,
        max_tokens=10**6,
        generator=torch.Generator(),
        pairs=pairs,
    )


def test_all_experts_at_once_give_what_each_gives_alone(family: str) -> None:
    for experts in find_experts(tiny_model(family)):
        hidden = torch.randn(13, experts.width, generator=torch.Generator().manual_seed(3))
        alone = [experts.run(hidden, experts.expert(i)) for i in range(experts.num_experts)]
        with torch.no_grad():
            torch.testing.assert_close(
                torch.cat([*experts.run_all(hidden)]), torch.stack(alone), rtol=1e-5, atol=1e-7
            )


def test_weights_that_do_not_lie_whole_are_read_one_expert_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scores(tiny_model())
    monkeypatch.setattr(fused, "lies_whole", lambda module: False)
    monkeypatch.setattr(fused.FusedExperts, "_weights", refusing_slices(fused.FusedExperts._weights))
    for a, b in zip(scores(tiny_model()), expected, strict=True):
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-5, atol=1e-9)


def refusing_slices(read: Any) -> Any:
    def one(experts: Any, index: int | slice) -> Any:
        assert isinstance(index, int)
        return read(experts, index)

    return one


def test_experts_scored_alone_have_the_same_errors_and_no_pairs() -> None:
    for one, all_ in zip(scores(tiny_model(), pairs=False), scores(tiny_model()), strict=True):
        torch.testing.assert_close(one.errors, all_.errors, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.gram, all_.gram.diagonal().diag(), rtol=1e-5, atol=1e-9)
        assert select("greedy", one, 1, torch.Generator()) == select("greedy", all_, 1, torch.Generator())
        with pytest.raises(GraftError, match="scored one by one; score them with pairs = True"):
            select("greedy", one, 2, torch.Generator())
        with pytest.raises(GraftError, match="a subset of 2 experts"):
            coefficients(one, (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    whole = scores(model)
    monkeypatch.setattr(selection, "STACK", 4 * 64 * 5)  # five tokens at a time; 21 are scored
    for a, b in zip(whole, scores(model), strict=True):
        assert a.tokens == b.tokens == 21
        torch.testing.assert_close((b.gram, b.cross, b.energy), (a.gram, a.cross, a.energy), rtol=1e-5, atol=1e-9)
        assert torch.equal(a.counts, b.counts)


def test_counts_and_weights_are_those_of_the_router(family: str) -> None:
    model = tiny_model(family)
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    with watched(model, seen):
        layers = scores(model)
    for layer in layers:
        counts, weights = [0] * 4, [0.0] * 4
        _, index, weight, _ = seen[layer.name]
        for token in MASK.reshape(-1).nonzero().flatten().tolist():
            for expert, given in zip(index[token].tolist(), weight[token].tolist(), strict=True):
                if expert < 4:  # further numbers are of no expert
                    counts[expert] += 1
                    weights[expert] += given
        assert layer.counts.tolist() == counts
        assert 0 < sum(counts) <= index.shape[1] * layer.tokens
        assert layer.weights.tolist() == pytest.approx(weights)


@pytest.mark.parametrize("pairs", [True, False])
def test_autocast_does_not_round_the_sums(pairs: bool) -> None:
    outputs, target = torch.randn(5, 200, 32, generator=torch.Generator().manual_seed(0)).bfloat16().split((4, 1))
    layer = LayerScores.empty("layer", 4, pairs=pairs)
    with torch.autocast("cpu", torch.bfloat16):
        layer.add(selection.products(target[0], [outputs[:1], outputs[1:]], pairs=pairs), 200)
    exact = (target.double() - outputs.double()).square().sum((1, 2))
    torch.testing.assert_close(layer.errors, exact, rtol=2e-6, atol=0)


def test_bf16_products_are_summed_in_float64() -> None:
    """Under autocast the experts may compute in bf16; the sums over tokens must not."""
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        layers, expected = scores(model), brute_force(model, tokens(), MASK)
    for layer, errors in zip(layers, expected, strict=True):
        assert layer.gram.dtype == layer.cross.dtype == torch.float64
        assert torch.linalg.eigvalsh(layer.gram).min() > 0
        torch.testing.assert_close(layer.errors, errors, rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_rules_work_on_a_models_sums(rule: str) -> None:
    for layer in scores(tiny_model()):
        chosen = select(rule, layer, 2, torch.Generator().manual_seed(0))
        assert len(set(chosen)) == len(coefficients(layer, chosen)) == 2
        best = subset_error(layer, select("exhaustive", layer, 2, torch.Generator()))
        assert best <= subset_error(layer, chosen) <= layer.energy


def test_token_budget_is_kept_and_spread() -> None:
    model, ids = tiny_model(), tokens()
    batches = [{"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(ids, MASK, strict=True)]
    layers = reconstruction_scores(
        lambda b: model(**b), find_experts(model), batches, max_tokens=9, generator=torch.Generator().manual_seed(0)
    )
    assert all(6 <= layer.tokens <= 12 for layer in layers)


def test_nothing_is_left_on_the_model_even_after_an_error() -> None:
    model = tiny_model()
    with pytest.raises(ZeroDivisionError):
        reconstruction_scores(
            lambda b: 1 / 0,
            find_experts(model),
            [{"attention_mask": MASK}],
            max_tokens=5,
            generator=torch.Generator(),
        )
    assert not any(m._forward_hooks for m in model.modules())


def test_empty_calibration_is_refused() -> None:
    with pytest.raises(GraftError, match="no token"):
        reconstruction_scores(print, find_experts(tiny_model()), [], max_tokens=5, generator=torch.Generator())


def test_more_experts_than_there_are_is_refused() -> None:
    with pytest.raises(GraftError, match=r"graft\.experts = 5"):
        LayerScores.empty("layer", 4).best(5)


def test_rows_are_drawn_from_the_stream() -> None:
    """With fewer rows than there are, another stream reads other rows; the same stream, the same."""
    from flexperts.data.prompts import Example

    model = tiny_model()
    rows = [Example(tuple(torch.randint(0, 250, (9,)).tolist()), 4) for _ in range(12)]
    graft = GraftConfig(calibration_rows=3, calibration_tokens=1000)
    settings = CalibrationSettings(graft, batch_size=2, pad_token_id=258, precision="fp32")
    errors = [
        score_experts(model, find_experts(model), rows, settings, torch.Generator().manual_seed(s))[0].errors
        for s in (1, 1, 2)
    ]
    assert torch.equal(errors[0], errors[1])
    assert not torch.equal(errors[0], errors[2])
