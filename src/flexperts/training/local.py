"""The local step: one client trains its shared and personal parameters on its own rows for a few steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Generator, Tensor, nn
from torch.autograd import backward
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from flexperts.config.run import TrainingConfig
from flexperts.data.batches import pad_batch, training_batches
from flexperts.data.prompts import Example
from flexperts.errors import FederationError
from flexperts.modeling.attention import attention_in_fp32, attention_without_cudnn
from flexperts.modeling.forward import Precision, autocast, token_losses
from flexperts.modeling.memory import freed_memory_kept
from flexperts.parameters.split import ParameterSplit

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter."""


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """Settings of one client's training in one round.

    Args:
        training: The recipe's section; how many steps a round has is decided by ``steps`` alone.
        precision: ``"bf16"`` computes under autocast; trained weights and their updates stay fp32.
        pad_token_id: Token that pads short rows.
        steps: Optimizer steps.
        total_steps: Steps of the whole run: the cosine is over all rounds.
        first_step: Steps before this round, for the schedule.
        warmup_steps: Steps of linear warm-up at the start of the run.
        own_lr: Pattern of parameter names, as of fnmatch -> their peak learning rate, instead of the group's.
        seconds: No step begins later than this after the first one; None = all steps are taken.
    """

    training: TrainingConfig
    precision: Precision
    pad_token_id: int
    steps: int
    total_steps: int
    first_step: int = 0
    warmup_steps: int = 0
    own_lr: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None

    def timed(self, share: float) -> LocalSettings:
        """Return the settings of a phase that takes all steps in a share of the seconds."""
        return replace(self, seconds=None if self.seconds is None else share * self.seconds)

    def part(self, share: float) -> LocalSettings:
        """Return the settings of a phase that takes a share of every round's steps, at least one."""
        steps = max(1, round(share * self.steps))
        scaled = {
            name: round(getattr(self, name) * steps / self.steps)
            for name in ("first_step", "total_steps", "warmup_steps")
        }
        seconds = None if self.seconds is None else self.seconds * steps / self.steps
        return replace(self, steps=steps, seconds=seconds, **scaled)


@dataclass(frozen=True, kw_only=True)
class StepHooks:
    """A method's additions to every optimizer step.

    Args:
        penalty: Returns a scalar to add to the loss, once per step.
        correct: Changes the gradients in place, after clipping.
        around_batch: Returns a context in which one step's forward and backward passes run.
    """

    penalty: Callable[[], Tensor] | None = None
    correct: Callable[[], None] | None = None
    around_batch: Callable[[], AbstractContextManager[object]] = nullcontext


Objective = Callable[[nn.Module, Sequence[Example], LocalSettings], Iterator[Tensor]]
"""Yields the parts of a batch's loss, one per micro-batch; training minimises their sum."""


@dataclass(frozen=True)
class TrainResult:
    """The result of local training.

    Args:
        loss: Mean of the objective over the steps: response NLL in nats per token, or DPO's loss in nats per row.
        steps: Optimizer steps done.
        rows: Rows in the client's train split: its weight in the average.
        tokens: Tokens processed, without padding.
        lr_sum: Sum of the shared parameters' learning rates over the steps.
        shared_steps: The steps in which shared parameters trained.
    """

    loss: float
    steps: int
    rows: int
    tokens: int
    lr_sum: float = 0.0
    shared_steps: int = 0


def joined(*phases: TrainResult) -> TrainResult:
    """Return the joint result of several phases of one round; the loss is the mean over all steps."""
    steps = sum(phase.steps for phase in phases)
    return TrainResult(
        loss=sum(phase.loss * phase.steps for phase in phases) / steps,
        steps=steps,
        rows=phases[0].rows,
        tokens=sum(phase.tokens for phase in phases),
        lr_sum=sum(phase.lr_sum for phase in phases),
        shared_steps=sum(phase.shared_steps for phase in phases),
    )


def response_loss(model: nn.Module, rows: Sequence[Example], settings: LocalSettings) -> Iterator[Tensor]:
    """Yield each micro-batch's share of the batch's mean response NLL (nats per token)."""
    size = settings.training.rows_per_pass
    total = sum(row.trained_tokens for row in rows)
    for start in range(0, len(rows), size):
        batch = pad_batch(rows[start : start + size], settings.pad_token_id)
        with autocast(next(model.parameters()).device, settings.precision):
            sums, _ = token_losses(model, batch)
        yield sums.sum() / total


@freed_memory_kept()
@attention_in_fp32()
@attention_without_cudnn()
def train_local(
    model: nn.Module,
    split: ParameterSplit,
    examples: Sequence[Example],
    settings: LocalSettings,
    generator: Generator,
    on_step: Callable[[float, int], None] = lambda loss, tokens: None,
    *,
    hooks: StepHooks | None = None,
    objective: Objective = response_loss,
    moments: MutableMapping[str, Tensor] | None = None,
) -> TrainResult:
    """Train the shared and personal parameters of ``model`` in place.

    Every round has a new optimizer, as in the paper's code base: its old moments belong to weights that
    the average has replaced. Personal weights are not replaced: with ``moments``, theirs are taken from there and
    put back in the end. ``on_step`` receives each step's loss, without the penalty, and its tokens.
    """
    hooks = hooks or StepHooks()
    optimizer, schedule = _optimizer(split, settings)
    if moments is not None:
        _take_moments(optimizer, split.personal, moments)
    losses, tokens, lr_sum = [], 0, 0.0
    end = math.inf if settings.seconds is None else time.monotonic() + settings.seconds
    model.train()
    for rows in training_batches(examples, settings.training.batch_size, settings.steps, generator):
        with hooks.around_batch():
            parts = objective(model, rows, settings)
            loss = _finite(_backward(parts, hooks.penalty), settings)
        clip_grad_norm_(split.trained.values(), settings.training.max_grad_norm)
        if hooks.correct:
            hooks.correct()
        lr_sum += optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
        tokens += (read := sum(len(form.input_ids) for row in rows for form in row.forms))
        on_step(loss, read)
        if time.monotonic() >= end:
            break
    _check_weights(split, settings)
    if moments is not None:
        _put_moments(optimizer, split.personal, moments)
    optimizer.state.clear()  # a reference cycle with the schedule would keep the moments until garbage collection
    model.eval()
    steps = len(losses)
    return TrainResult(sum(losses) / steps, steps, len(examples), tokens, lr_sum, steps if split.shared else 0)


def _backward(parts: Iterator[Tensor], penalty: Callable[[], Tensor] | None) -> float:
    """Add up the gradients of the loss's parts and of the penalty; return the loss."""
    loss: Tensor | float = 0.0
    for part in parts:
        if part.requires_grad:  # False if the only trained part is disabled in this batch
            backward(part)
        loss = loss + part.detach().double()  # added where it is: a card is waited for once a step
    if penalty:
        backward(penalty())
    return float(loss)


def _optimizer(split: ParameterSplit, settings: LocalSettings) -> tuple[Optimizer, LRScheduler]:
    training = settings.training
    rates = ((split.shared, training.lr), (split.personal, training.personal_lr or training.lr))
    groups = [
        {"params": list(ps.values()), "lr": lr, "initial_lr": lr}
        for group, group_lr in rates
        for ps, lr in _by_rate(group, group_lr, settings.own_lr)
    ]
    kind = AdamW if training.optimizer == "adamw" else SGD
    optimizer = kind(groups, weight_decay=training.weight_decay, fused=True)
    # initial_lr and last_epoch start the new schedule at the step where the previous round ended.
    schedule = get_cosine_schedule_with_warmup(
        optimizer, settings.warmup_steps, settings.total_steps, last_epoch=settings.first_step - 1
    )
    return optimizer, schedule


def _by_rate(
    group: Mapping[str, Parameter], lr: float, own_lr: Mapping[str, float]
) -> Iterator[tuple[dict[str, Parameter], float]]:
    """Yield a group's parameters by learning rate: first those with the group's rate, then each pattern."""
    if usual := {n: p for n, p in group.items() if not any(fnmatchcase(n, pattern) for pattern in own_lr)}:
        yield usual, lr
    for pattern, rate in own_lr.items():
        if own := {n: p for n, p in group.items() if fnmatchcase(n, pattern)}:
            yield own, rate


def _take_moments(
    optimizer: Optimizer, personal: Mapping[str, Parameter], moments: MutableMapping[str, Tensor]
) -> None:
    """Move stored moments into the optimizer. They are copied: stored ones may be views of a file."""
    for name, parameter in personal.items():
        kept = {what: moments.pop(key) for what in _MOMENTS if (key := f"{what}.{name}") in moments}
        if kept:
            optimizer.state[parameter] = {what: t.to(parameter.device, copy=True) for what, t in kept.items()}


def _put_moments(
    optimizer: Optimizer, personal: Mapping[str, Parameter], moments: MutableMapping[str, Tensor]
) -> None:
    """Move the optimizer's moments into the CPU's memory; a parameter that never had a gradient has none."""
    for name, parameter in personal.items():
        for what in _MOMENTS if parameter in optimizer.state else ():
            moments[f"{what}.{name}"] = optimizer.state[parameter][what].cpu()


def _finite(loss: float, settings: LocalSettings) -> float:
    if not math.isfinite(loss):
        raise _diverged(f"training loss = {loss}", settings)
    return loss


def _check_weights(split: ParameterSplit, settings: LocalSettings) -> None:
    """Refuse what the last step may leave, whose loss is never computed: no server sees the personal weights."""
    whole = [parameter.isfinite().all() for parameter in split.trained.values()]
    whole = [fine.to(whole[0].device) for fine in whole]  # layers may be on several cards
    if whole and not torch.stack(whole).all():
        name = next(name for name, fine in zip(split.trained, whole, strict=True) if not fine)
        raise _diverged(f"{name} after the last step", settings)


def _diverged(value: str, settings: LocalSettings) -> FederationError:
    remedy = f"lower training.lr (now {settings.training.lr:g}), training.personal_lr or graft.gate_lr"
    return FederationError(value, "it must be finite", remedy)
