"""The local step: one client trains its shared and personal parameters on its own rows for a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from flexperts.data.batches import pad_batch, training_batches
from flexperts.data.prompts import Example
from flexperts.errors import FederationError
from flexperts.modeling.forward import Precision, autocast, token_losses
from flexperts.parameters.split import ParameterSplit


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """What one client does in one round.

    Args:
        steps: Optimizer steps.
        batch_size: Rows per step.
        micro_batch_size: Rows per forward pass; gradients accumulate up to ``batch_size``.
        lr: Peak learning rate of the shared parameters.
        personal_lr: Peak learning rate of the personal parameters.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Gradient clipping threshold over all trained parameters together.
        first_step: Steps that this client has behind it, for the schedule.
        total_steps: Steps of the whole run: the cosine goes over rounds, not within one.
        warmup_steps: Steps of linear warm-up at the start of the run.
        precision: ``"bf16"`` computes under autocast; trained weights and their updates stay fp32.
        pad_token_id: Token that fills short rows.
    """

    steps: int
    batch_size: int
    micro_batch_size: int
    lr: float
    personal_lr: float
    weight_decay: float
    max_grad_norm: float
    first_step: int
    total_steps: int
    warmup_steps: int
    precision: Precision
    pad_token_id: int


@dataclass(frozen=True)
class TrainResult:
    """What a local step reports.

    Args:
        loss: Mean response NLL over the steps, nats per token.
        steps: Optimizer steps done.
        rows: Rows in the client's train split: its weight in the average.
        tokens: Tokens processed, padding left out.
    """

    loss: float
    steps: int
    rows: int
    tokens: int


def train_local(
    model: nn.Module,
    split: ParameterSplit,
    examples: Sequence[Example],
    settings: LocalSettings,
    generator: Generator,
    on_step: Callable[[float], None] = lambda loss: None,
) -> TrainResult:
    """Train the shared and personal parameters of ``model`` in place.

    The optimizer starts afresh every round, as in the paper's code base: its moments belong to weights that the
    average has replaced. ``on_step`` gets each step's loss.

    Raises:
        FederationError: The loss is not finite.
    """
    accelerator = Accelerator()
    optimizer, schedule = _optimizer(split, settings)
    losses, tokens = [], 0
    model.train()
    for rows in training_batches(examples, settings.batch_size, settings.steps, generator):
        loss = _finite(_backward(accelerator, model, rows, settings), settings)
        accelerator.clip_grad_norm_(split.trained.values(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
        tokens += sum(len(row.input_ids) for row in rows)
        on_step(loss)
    model.eval()
    return TrainResult(sum(losses) / len(losses), len(losses), len(examples), tokens)


def _backward(accelerator: Accelerator, model: nn.Module, rows: list[Example], settings: LocalSettings) -> float:
    """Add up the gradient of the batch's mean token loss over its micro-batches."""
    size = settings.micro_batch_size
    total = sum(len(row.input_ids) - row.prompt_length for row in rows)
    loss = 0.0
    for start in range(0, len(rows), size):
        batch = pad_batch(rows[start : start + size], settings.pad_token_id)
        with autocast(next(model.parameters()).device, settings.precision):
            sums, _ = token_losses(model, batch)
        part: Tensor = sums.sum() / total
        accelerator.backward(part)
        loss += part.item()
    return loss


def _optimizer(split: ParameterSplit, settings: LocalSettings) -> tuple[Optimizer, LRScheduler]:
    rates = ((split.shared, settings.lr), (split.personal, settings.personal_lr))
    groups = [{"params": list(ps.values()), "lr": lr, "initial_lr": lr} for ps, lr in rates if ps]
    optimizer = AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    # initial_lr and last_epoch put the fresh schedule where the previous round left off.
    schedule = get_cosine_schedule_with_warmup(
        optimizer, settings.warmup_steps, settings.total_steps, last_epoch=settings.first_step - 1
    )
    return optimizer, schedule


def _finite(loss: float, settings: LocalSettings) -> float:
    if not math.isfinite(loss):
        raise FederationError(
            f"training loss = {loss}",
            "it must be finite",
            f"lower training.lr (now {settings.lr:g}) or personal_lr",
        )
    return loss


def steps_per_round(rows: int, batch_size: int, local_steps: int | None, local_epochs: float) -> int:
    """Return a client's optimizer steps per round: ``local_steps`` where given, else its epochs."""
    return local_steps or max(1, math.ceil(local_epochs * math.ceil(rows / batch_size)))
