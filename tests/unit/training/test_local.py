"""The local step: schedule over rounds, rates by group, clipping, and a loss on responses only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flexperts.config.run import TrainingConfig
from flexperts.data.batches import IGNORED, pad_batch
from flexperts.data.prompts import Example
from flexperts.errors import FederationError
from flexperts.modeling.forward import response_logits, token_losses
from flexperts.parameters.split import ParameterSplit, split_parameters
from flexperts.testing import tiny_model
from flexperts.training.local import LocalSettings, StepHooks, train_local

TRAINING = TrainingConfig(batch_size=4, lr=0.01, personal_lr=0.002, max_grad_norm=1e9)
SETTINGS = LocalSettings(training=TRAINING, precision="fp32", pad_token_id=258, steps=1, total_steps=10)
EXAMPLES = [
    Example((10, 11, 12, 13, 14, 257), 3),
    Example((20, 21, 257), 1),
    Example((30, 31, 32, 33, 34, 35, 36, 37, 257), 7),
    Example((40, 41, 42, 43, 257), 2),
]


def settings_with(**fields: Any) -> LocalSettings:
    """SETTINGS with other values of its own or of the recipe's section."""
    section = {n: fields.pop(n) for n in TrainingConfig.model_fields if n in fields}
    return replace(SETTINGS, training=TRAINING.model_copy(update=section), **fields)


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
        settings = settings_with(steps=4, first_step=first, total_steps=12, warmup_steps=warmup)
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
    train_local(model, split, EXAMPLES, settings_with(steps=3), stream())
    before = {n: p.detach().clone() for n, p in split.shared.items()}
    train_local(model, split, EXAMPLES, settings_with(first_step=3), stream())
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in split.shared.items())
    assert moved == pytest.approx(0.01 * cosine(3, 0, 10), rel=1e-3)


def test_no_moments_are_left_behind(model: Any, split: ParameterSplit) -> None:
    """Optimizer and schedule hold each other; with whole experts the moments are gigabytes."""
    seen: list[Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    train_local(model, split, EXAMPLES, SETTINGS, stream())
    handle.remove()
    assert not seen[0].state


def test_only_trained_parameters_change(model: Any, split: ParameterSplit) -> None:
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    train_local(model, split, EXAMPLES, settings_with(steps=3, weight_decay=0.1), stream())
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
        train_local(model, replace(split, personal={}), EXAMPLES, settings_with(weight_decay=decay), stream())
        after[decay] = {n: p.detach().clone() for n, p in split.shared.items()}
    for name, tensor in before.items():
        torch.testing.assert_close(after[0.5][name], after[0.0][name] - 0.01 * 0.5 * tensor, atol=1e-6, rtol=0)


def test_gradients_are_clipped_over_both_groups_together(split: ParameterSplit, steps: Steps) -> None:
    for threshold in (1e9, 0.01):
        fresh = tiny_model(seed=1)
        settings = settings_with(max_grad_norm=threshold)
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
    train_local(model, split, EXAMPLES, settings_with(max_grad_norm=1e3), stream())
    for ours, expected in zip(steps.grads[0], free, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(split: ParameterSplit, steps: Steps, size: int) -> None:
    """Rows differ in length, so a mean of micro-batch means would not be the batch's mean token loss."""
    losses = []
    for micro in (4, size):
        fresh = tiny_model(seed=1)
        settings = settings_with(micro_batch_size=micro)
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


@pytest.mark.parametrize("rates", [{"lr": 1e39}, {"lr": 0.01, "personal_lr": 1e39}])
def test_weights_that_the_last_step_breaks_are_refused(
    model: Any, split: ParameterSplit, rates: dict[str, float]
) -> None:
    """The loss of that step is finite; without this look a silo would keep such a personal part."""
    settings = settings_with(steps=1, **rates)
    with pytest.raises(FederationError, match=r".* after the last step: it must be finite; lower training\.lr"):
        train_local(model, split, EXAMPLES, settings, stream())


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
    assert widths == [3, 9]  # a column for each response column
    assert few.shape == (4, 3, 260)
    torch.testing.assert_close(few, all_of_them, rtol=1e-5, atol=1e-6)
    assert few.dtype == torch.float32


def test_training_is_a_function_of_the_generator(split: ParameterSplit) -> None:
    def trained(seed: int) -> list[Tensor]:
        fresh = tiny_model(seed=1)
        parts = matching(fresh, split)
        settings = settings_with(steps=3, batch_size=2)
        train_local(fresh, parts, EXAMPLES, settings, torch.Generator().manual_seed(seed))
        return list(parts.trained.values())

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    first = trained(0)
    assert same(first, trained(0))
    assert not all(same(first, trained(seed)) for seed in range(1, 5))  # two draws can be alike


def test_every_step_reports_its_loss_and_tokens(model: Any, split: ParameterSplit) -> None:
    told: list[tuple[float, int]] = []
    result = train_local(model, split, EXAMPLES, settings_with(steps=5), stream(), lambda *step: told.append(step))
    losses = [loss for loss, _ in told]
    assert sum(tokens for _, tokens in told) == result.tokens
    assert len(losses) == result.steps == 5
    assert result.loss == pytest.approx(sum(losses) / 5)
    assert losses[-1] < losses[0]


def test_trained_weights_stay_fp32_under_bf16_products(split: ParameterSplit) -> None:
    fresh = tiny_model(seed=1)
    parts = matching(fresh, split)
    result = train_local(fresh, parts, EXAMPLES, settings_with(precision="bf16"), stream())
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
    training = TrainingConfig(batch_size=batch_size, local_steps=local_steps, local_epochs=local_epochs)
    assert training.steps_per_round(rows) == steps


# What methods add to a step


def gradients_of(
    split: ParameterSplit, steps: Steps, settings: LocalSettings, hooks: StepHooks | None
) -> list[Tensor]:
    """Train one fresh copy and return the first step's gradients as the optimizer saw them."""
    first = len(steps.grads)
    fresh = tiny_model(seed=1)
    parts = matching(fresh, split)
    if hooks is not None and hooks.penalty is not None:
        hooks = replace(hooks, penalty=lambda: pull(parts))
    train_local(fresh, parts, EXAMPLES, settings, stream(), hooks=hooks)
    return steps.grads[first]


def pull(split: ParameterSplit) -> Tensor:
    """A penalty whose gradient is known: 3 w for every shared weight."""
    return torch.stack([1.5 * p.square().sum() for p in split.shared.values()]).sum()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_penalty_adds_its_gradient_once_per_step(split: ParameterSplit, steps: Steps, size: int) -> None:
    settings = settings_with(micro_batch_size=size)
    plain = gradients_of(split, steps, settings, None)
    ours = gradients_of(split, steps, settings, StepHooks(penalty=lambda: torch.zeros(())))
    own = [3 * p.detach() for p in matching(tiny_model(seed=1), split).shared.values()]
    expected = [g + p for g, p in zip(plain, own, strict=False)] + plain[len(own) :]
    assert len(own) == 2 < len(plain)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_penalty_is_evaluated_once_per_step_and_left_out_of_the_loss(model: Any, split: ParameterSplit) -> None:
    calls: list[Tensor] = []

    def penalty() -> Tensor:
        calls.append(100 * next(iter(split.shared.values())).square().sum())
        return calls[-1]

    expected = by_hand(model, EXAMPLES).item()
    settings = settings_with(steps=3, micro_batch_size=1)
    losses: list[float] = []
    train_local(
        model,
        split,
        EXAMPLES,
        settings,
        stream(),
        lambda loss, _: losses.append(loss),
        hooks=StepHooks(penalty=penalty),
    )
    assert len(calls) == 3
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert calls[2] < calls[0]  # and it was minimised


def test_the_penalty_is_clipped_with_the_loss(split: ParameterSplit, steps: Steps) -> None:
    settings = settings_with(max_grad_norm=0.01)
    gradients_of(split, steps, settings, StepHooks(penalty=lambda: torch.zeros(())))
    assert steps.norm(0) == pytest.approx(0.01, rel=1e-4)


def test_corrections_see_clipped_gradients_and_are_not_clipped(
    model: Any, split: ParameterSplit, steps: Steps
) -> None:
    seen: list[list[Tensor]] = []

    def correct() -> None:
        seen.append([p.grad.clone() for p in split.trained.values()])  # type: ignore[union-attr]
        for parameter in split.trained.values():
            parameter.grad.add_(5.0)  # type: ignore[union-attr]

    settings = settings_with(steps=2, micro_batch_size=1, max_grad_norm=0.01)
    train_local(model, split, EXAMPLES, settings, stream(), hooks=StepHooks(correct=correct))
    assert len(seen) == 2
    assert float(torch.cat([g.flatten() for g in seen[0]]).double().norm()) == pytest.approx(0.01, rel=1e-4)
    for before, stepped in zip(seen, steps.grads, strict=True):
        assert all(torch.equal(b + 5, s) for b, s in zip(before, stepped, strict=True))


def test_the_context_of_a_batch_spans_its_passes(model: Any, split: ParameterSplit) -> None:
    """All forward and backward passes of a step lie inside one context; corrections and the step outside."""
    events: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    def stepped(*_: Any) -> None:
        events.append("step")

    watched = next(iter(split.shared.values()))
    handles = [
        model.register_forward_pre_hook(lambda *_: events.append("forward")),
        watched.register_hook(lambda grad: events.append("backward")),
        register_optimizer_step_pre_hook(stepped),
    ]
    hooks = StepHooks(around_batch=around, correct=lambda: events.append("correct"))
    settings = settings_with(steps=2, micro_batch_size=2)
    train_local(model, split, EXAMPLES, settings, stream(), lambda loss, tokens: events.append("told"), hooks=hooks)
    for handle in handles:
        handle.remove()
    one = ["enter", "forward", "backward", "forward", "backward", "leave", "correct", "step", "told"]
    assert events == one * 2


def test_no_hooks_are_the_same_as_empty_ones(split: ParameterSplit) -> None:
    trained = []
    for hooks in (None, StepHooks()):
        fresh = tiny_model(seed=1)
        parts = matching(fresh, split)
        train_local(fresh, parts, EXAMPLES, settings_with(steps=2), stream(), hooks=hooks)
        trained.append(list(parts.trained.values()))
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.002])
def test_sgd_by_hand(model: Any, split: ParameterSplit, decay: float) -> None:
    """w <- w - lr (g + decay w), without momentum, each group at its own rate and on one cosine."""
    twin = tiny_model(seed=1)
    parts = matching(twin, split)
    weights = {n: p.detach().double() for n, p in parts.trained.items()}
    for step in range(2):
        with torch.no_grad():
            for name, parameter in parts.trained.items():
                parameter.copy_(weights[name])
                parameter.grad = None
        by_hand(twin, EXAMPLES).backward()
        for name, parameter in parts.trained.items():
            rate = (100 if name in parts.shared else 1) * cosine(step, 0, 10)
            assert parameter.grad is not None
            weights[name] = weights[name] - rate * (parameter.grad.double() + decay * weights[name])
    before = {n: p.detach().clone() for n, p in split.trained.items()}
    settings = settings_with(optimizer="sgd", lr=100.0, personal_lr=1.0, weight_decay=decay, steps=2)
    train_local(model, split, EXAMPLES, settings, stream())
    for name, parameter in split.trained.items():
        moved = float((parameter.detach() - before[name]).abs().max())
        assert moved > 1e-3
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=0, atol=2e-3 * moved)


@pytest.mark.parametrize(("warmup", "first"), [(0, 0), (3, 0), (3, 2), (0, 8)])
def test_the_sum_of_rates_by_hand(model: Any, split: ParameterSplit, warmup: int, first: int) -> None:
    """It is over this round's steps and of the shared group's rate."""
    settings = settings_with(steps=4, first_step=first, total_steps=12, warmup_steps=warmup)
    result = train_local(model, split, EXAMPLES, settings, stream())
    assert result.lr_sum == pytest.approx(0.01 * sum(cosine(s, warmup, 12) for s in range(first, first + 4)))


def test_the_sum_of_rates_without_a_shared_group(model: Any, split: ParameterSplit) -> None:
    result = train_local(model, replace(split, shared={}), EXAMPLES, SETTINGS, stream())
    assert result.lr_sum == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, (10, 20, 40, 5)),
        (0.5, (5, 10, 20, 2)),
        (0.3, (3, 6, 12, 2)),
        (0.01, (1, 2, 4, 0)),
        (0.2, (2, 4, 8, 1)),
    ],
)
def test_a_phase_takes_a_share_of_every_round(share: float, expected: tuple[int, ...]) -> None:
    """Its own schedule: as if the run had only the phase's steps."""
    whole = settings_with(steps=10, first_step=20, total_steps=40, warmup_steps=5)
    part = whole.part(share)
    assert (part.steps, part.first_step, part.total_steps, part.warmup_steps) == expected
    kept = {"steps", "first_step", "total_steps", "warmup_steps"}
    assert all(getattr(part, n) == v for n, v in vars(whole).items() if n not in kept)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("per_round", [1, 3, 10])
def test_phases_of_all_rounds_join_to_one_schedule(share: float, per_round: int) -> None:
    """Every round's phase starts where the last one's ended, and the last one's end is the schedule's."""
    parts = [
        settings_with(steps=per_round, first_step=r * per_round, total_steps=4 * per_round).part(share)
        for r in range(4)
    ]
    assert [p.first_step for p in parts] == [r * parts[0].steps for r in range(4)]
    assert {p.total_steps for p in parts} == {4 * parts[0].steps}


def test_a_cpu_trains_with_attention_in_fp32(
    model: Any, split: ParameterSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products run in bf16 around it."""
    seen, kernel = [], F.scaled_dot_product_attention

    def noted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    train_local(model, split, EXAMPLES, settings_with(precision="bf16"), stream())
    assert set(seen) == {(torch.float32, False)}
