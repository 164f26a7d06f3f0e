"""The local step: schedule over rounds, rates by group, clipping, and a loss on responses only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flexperts.data.batches import IGNORED, pad_batch
from flexperts.data.prompts import Example
from flexperts.errors import FederationError
from flexperts.modeling.forward import response_logits, token_losses
from flexperts.parameters.split import ParameterSplit, split_parameters
from flexperts.testing import tiny_model
from flexperts.training.local import LocalSettings, steps_per_round, train_local

SETTINGS = LocalSettings(
    steps=1,
    batch_size=4,
    micro_batch_size=4,
    lr=0.01,
    personal_lr=0.002,
    weight_decay=0.0,
    max_grad_norm=1e9,
    first_step=0,
    total_steps=10,
    warmup_steps=0,
    precision="fp32",
    pad_token_id=258,
)
EXAMPLES = [
    Example((10, 11, 12, 13, 14, 257), 3),
    Example((20, 21, 257), 1),
    Example((30, 31, 32, 33, 34, 35, 36, 37, 257), 7),
    Example((40, 41, 42, 43, 257), 2),
]


@pytest.fixture
def model() -> Any:
    return tiny_model(seed=1)


@pytest.fixture
def split(model: Any) -> ParameterSplit:
    """Query projections as the shared part, value projections as the personal one."""
    names = dict(model.named_parameters())
    shared = [n for n in names if "q_proj.weight" in n]
    personal = [n for n in names if "v_proj.weight" in n]
    for name in shared + personal:
        names[name].requires_grad_(True)
    return split_parameters(names, shared, personal)


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Steps:
    """Learning rates and gradients as the optimizer sees them."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.grads: list[list[Tensor]] = []

    def record(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])
        self.grads.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    def norm(self, step: int) -> float:
        return float(torch.cat([g.flatten() for g in self.grads[step]]).double().norm())


@pytest.fixture
def steps() -> Iterator[Steps]:
    seen = Steps()
    handle = register_optimizer_step_pre_hook(seen.record)
    yield seen
    handle.remove()


def cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedule_goes_on_over_rounds(model: Any, split: ParameterSplit, steps: Steps, warmup: int) -> None:
    """Rounds of 4 steps follow one cosine of 12, with both groups' own peak rates."""
    for first in (0, 4, 8):
        settings = replace(SETTINGS, steps=4, first_step=first, total_steps=12, warmup_steps=warmup)
        train_local(model, split, EXAMPLES, settings, stream())
    expected = [[peak * cosine(s, warmup, 12) for peak in (0.01, 0.002)] for s in range(12)]
    assert steps.rates == [pytest.approx(rates) for rates in expected]


def test_personal_and_shared_parameters_move_at_their_rates(model: Any, split: ParameterSplit) -> None:
    """Adam's first step has the length of the learning rate in every coordinate with a gradient."""
    before = {n: p.detach().clone() for n, p in split.trained.items()}
    train_local(model, split, EXAMPLES, SETTINGS, stream())
    for group, rate in ((split.shared, 0.01), (split.personal, 0.002)):
        for name, parameter in group.items():
            assert float((parameter.detach() - before[name]).abs().max()) == pytest.approx(rate, rel=1e-3)


def test_each_round_starts_with_a_fresh_optimizer(model: Any, split: ParameterSplit) -> None:
    """With old moments, the step after others would differ from the first one's length."""
    train_local(model, split, EXAMPLES, replace(SETTINGS, steps=3), stream())
    before = {n: p.detach().clone() for n, p in split.shared.items()}
    train_local(model, split, EXAMPLES, replace(SETTINGS, first_step=3), stream())
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in split.shared.items())
    assert moved == pytest.approx(0.01 * cosine(3, 0, 10), rel=1e-3)


def test_only_trained_parameters_change(model: Any, split: ParameterSplit) -> None:
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    train_local(model, split, EXAMPLES, replace(SETTINGS, steps=3, weight_decay=0.1), stream())
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == split.trained.keys()
    assert all(p.grad is None for p in split.frozen.values())
    assert not model.training


def test_weight_decay_is_decoupled(model: Any, split: ParameterSplit) -> None:
    """Beyond Adam's step a weight shrinks by lr * decay of itself."""
    before = {n: p.detach().clone() for n, p in split.shared.items()}
    after = {}
    for decay in (0.0, 0.5):
        with torch.no_grad():
            for name, parameter in split.shared.items():
                parameter.copy_(before[name])
        train_local(model, replace(split, personal={}), EXAMPLES, replace(SETTINGS, weight_decay=decay), stream())
        after[decay] = {n: p.detach().clone() for n, p in split.shared.items()}
    for name, tensor in before.items():
        torch.testing.assert_close(after[0.5][name], after[0.0][name] - 0.01 * 0.5 * tensor, atol=1e-6, rtol=0)


def test_gradients_are_clipped_over_both_groups_together(split: ParameterSplit, steps: Steps) -> None:
    for threshold in (1e9, 0.01):
        fresh = tiny_model(seed=1)
        settings = replace(SETTINGS, max_grad_norm=threshold)
        train_local(fresh, matching(fresh, split), EXAMPLES, settings, stream())
    assert steps.norm(0) > 0.02  # else the test clips nothing
    assert steps.norm(1) == pytest.approx(0.01, rel=1e-4)
    scale = steps.norm(1) / steps.norm(0)
    for free, clipped in zip(*steps.grads, strict=True):
        torch.testing.assert_close(clipped, free * scale, rtol=1e-4, atol=1e-8)


def matching(model: Any, split: ParameterSplit) -> ParameterSplit:
    parameters = dict(model.named_parameters())
    for name in split.trained:
        parameters[name].requires_grad_(True)
    return split_parameters(parameters, split.shared, split.personal)


def test_small_gradients_are_left_alone(model: Any, split: ParameterSplit, steps: Steps) -> None:
    loss = by_hand(model, EXAMPLES)
    loss.backward()
    free = [p.grad.clone() for p in split.trained.values()]  # type: ignore[union-attr]
    for parameter in split.trained.values():
        parameter.grad = None
    train_local(model, split, EXAMPLES, replace(SETTINGS, max_grad_norm=1e3), stream())
    for ours, expected in zip(steps.grads[0], free, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(split: ParameterSplit, steps: Steps, size: int) -> None:
    """Rows differ in length, so a mean of micro-batch means would not be the batch's mean token loss."""
    losses = []
    for micro in (4, size):
        fresh = tiny_model(seed=1)
        settings = replace(SETTINGS, micro_batch_size=micro)
        losses.append(train_local(fresh, matching(fresh, split), EXAMPLES, settings, stream()).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for whole, parts in zip(*steps.grads, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_not_finite_is_refused(model: Any, split: ParameterSplit) -> None:
    with torch.no_grad():
        next(iter(split.shared.values()))[0, 0] = float("nan")
    with pytest.raises(
        FederationError, match=r"training loss = nan: it must be finite; lower training\.lr \(now 0\.01\)"
    ):
        train_local(model, split, EXAMPLES, SETTINGS, stream())


def by_hand(model: Any, examples: list[Example]) -> Tensor:
    """Mean NLL per response token: full logits, one unpadded row at a time, float64."""
    terms = []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        for place in range(example.prompt_length, len(example.input_ids)):
            row = logits[place - 1]
            terms.append(torch.logsumexp(row, 0) - row[example.input_ids[place]])
    return torch.stack(terms).mean()


def test_the_loss_is_the_responses_cross_entropy(model: Any, split: ParameterSplit) -> None:
    expected = by_hand(model, EXAMPLES).item()
    result = train_local(model, split, EXAMPLES, SETTINGS, stream())
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert (result.steps, result.rows, result.tokens) == (1, 4, 23)


@torch.no_grad()
def test_losses_are_summed_row_by_row_over_responses_only(model: Any) -> None:
    batch = pad_batch(EXAMPLES, 258)
    sums, counts = token_losses(model, batch)
    assert counts.tolist() == [3, 2, 2, 3]
    for row, example in enumerate(EXAMPLES):
        assert float(sums[row]) == pytest.approx(by_hand(model, [example]).item() * int(counts[row]), rel=1e-5)
        labels = batch.labels[row][batch.labels[row] != IGNORED].tolist()
        assert tuple(labels) == example.input_ids[example.prompt_length :]


class FullLogits(nn.Module):
    """A model whose forward knows no logits_to_keep."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@torch.no_grad()
def test_computing_only_the_needed_logits_changes_nothing(model: Any) -> None:
    widths = []
    handle = model.register_forward_hook(lambda module, args, output: widths.append(output.logits.shape[1]))
    batch = pad_batch(EXAMPLES, 258)
    few, all_of_them = response_logits(model, batch), response_logits(FullLogits(model), batch)
    handle.remove()
    assert widths == [4, 9]  # 3 response columns and the one before them
    assert few.shape == (4, 3, 260)
    torch.testing.assert_close(few, all_of_them, rtol=1e-5, atol=1e-6)
    assert few.dtype == torch.float32


def test_training_is_a_function_of_the_generator(split: ParameterSplit) -> None:
    def trained(seed: int) -> list[Tensor]:
        fresh = tiny_model(seed=1)
        parts = matching(fresh, split)
        settings = replace(SETTINGS, steps=3, batch_size=2)
        train_local(fresh, parts, EXAMPLES, settings, torch.Generator().manual_seed(seed))
        return list(parts.trained.values())

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    first = trained(0)
    assert same(first, trained(0))
    assert not all(same(first, trained(seed)) for seed in range(1, 5))  # two draws can be alike


def test_every_step_reports_its_loss(model: Any, split: ParameterSplit) -> None:
    losses: list[float] = []
    result = train_local(model, split, EXAMPLES, replace(SETTINGS, steps=5), stream(), losses.append)
    assert len(losses) == result.steps == 5
    assert result.loss == pytest.approx(sum(losses) / 5)
    assert losses[-1] < losses[0]


def test_trained_weights_stay_fp32_under_bf16_products(split: ParameterSplit) -> None:
    fresh = tiny_model(seed=1)
    parts = matching(fresh, split)
    result = train_local(fresh, parts, EXAMPLES, replace(SETTINGS, precision="bf16"), stream())
    assert {p.dtype for p in parts.trained.values()} == {torch.float32}
    exact = by_hand(tiny_model(seed=1), EXAMPLES).item()
    assert result.loss == pytest.approx(exact, rel=0.02)
    assert result.loss != pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(
    ("rows", "batch_size", "local_steps", "local_epochs", "steps"),
    [
        (10, 4, None, 1.0, 3),
        (10, 4, None, 2.0, 6),
        (10, 4, None, 0.5, 2),
        (10, 4, None, 0.01, 1),
        (10, 4, 7, 2.0, 7),
    ],
)
def test_steps_per_round(
    rows: int, batch_size: int, local_steps: int | None, local_epochs: float, steps: int
) -> None:
    assert steps_per_round(rows, batch_size, local_steps, local_epochs) == steps
