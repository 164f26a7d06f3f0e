"""Training a split model's terms to predict what its dense parent predicts.

    loss = KL(parent || split), mean over tokens
         + hidden * mean over layers and tokens of ||h - h_parent||^2 / ||h_parent||^2
         + balance * mean over layers of N sum_i f_i P_i / K

f_i is the share of tokens that choose expert i, P_i its mean router probability; the last term (Switch Transformer,
arXiv 2101.03961, eq. 4) is 1 where the layer's load is even.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from flexperts.checked_file import read_sealed, write_sealed
from flexperts.errors import ModelError
from flexperts.seeding import generator

FORMAT = "flexperts.healing.1"
MOMENTS = ("exp_avg", "exp_avg_sq")


def _grouped_flops(rows: torch.Size, matrices: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of a grouped product, forward or backward; torch does not count them."""
    return 2 * rows[0] * rows[-1] * matrices[-1]


GROUPED = {torch.ops.aten._grouped_mm: _grouped_flops}


@dataclass(frozen=True)
class Schedule:
    """How the terms are trained.

    Attributes:
        steps: Number of optimizer steps; the rates rise linearly over `warmup` and fall to zero as a cosine.
        batch: Rows of a step.
        lr: Rate of the experts' terms.
        small_lr: Rate of the terms of routers, norms and the shared expert's gate.
        warmup: Share of the steps.
        balance: Weight of the load-balancing loss.
        hidden: Weight of the hidden states' distance.
        seed: Of the order of rows.
        save_every: Steps between checkpoints.
    """

    steps: int
    batch: int
    lr: float
    small_lr: float
    warmup: float
    balance: float
    hidden: float
    seed: int
    save_every: int

    def rate(self, step: int) -> float:
        """Return the factor of the rates at a step, from 0."""
        rising = max(1, round(self.warmup * self.steps))
        return min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def rows(self, step: int, count: int) -> Tensor:
        """Return the rows of a step, of `count`: every epoch has its own order, and batches go across epochs."""
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {
            e: torch.randperm(count, generator=generator(self.seed, "order", e))
            for e in {p // count for p in places}
        }
        return torch.stack([orders[place // count][place % count] for place in places])


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return KL(wanted || found) of logits `[B, S, V]`, by token `[B, S]`, in nats."""
    goal, ours = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return F.kl_div(ours, goal, log_target=True, reduction="none").sum(-1)


def losses(parent: Any, model: Any, ids: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return the loss to minimize, and its first term alone, for rows `ids [B, S]`."""
    deep = schedule.hidden > 0
    with torch.no_grad():
        wanted = parent(input_ids=ids, use_cache=False, output_hidden_states=deep)
    with parametrize.cached():  # each sum W + BA is computed once
        found = model(input_ids=ids, use_cache=False, output_hidden_states=deep, output_router_logits=True)
    kl = divergence(wanted.logits, found.logits).mean()
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    # Layer by layer: the model's own auxiliary loss is even where the mean over layers is.
    loads = [load_balancing_loss_func((logits,), experts, top_k) / top_k for logits in found.router_logits]
    loss = kl + schedule.balance * torch.stack(loads).mean()
    if deep:
        pairs = zip(wanted.hidden_states[1:], found.hidden_states[1:], strict=True)
        loss = loss + schedule.hidden * torch.stack([_distance(w.float(), f.float()) for w, f in pairs]).mean()
    return loss, kl.detach()


def _distance(wanted: Tensor, found: Tensor) -> Tensor:
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


def train(
    parent: Any,
    model: Any,
    terms: Mapping[str, nn.Parameter],
    rows: Tensor,
    schedule: Schedule,
    checkpoint: Path,
    report: Callable[[str], None],
) -> None:
    """Train the terms in place, from the checkpoint if there is one; on a CPU both ways give the same bits.

    Args:
        parent: The dense model.
        model: The split model, with `terms` attached.
        terms: The parameters to train.
        rows: Tokens `[N, S]`.
        schedule: How they are trained.
        checkpoint: The file of terms and optimizer state.
        report: Receives progress lines.

    Raises:
        ModelError: A loss, a gradient or a term is not finite; the checkpoint before stays.
    """
    matrices = [term for term in terms.values() if term.dim() == 3]
    small = [term for term in terms.values() if term.dim() < 3]
    rates = (schedule.lr, schedule.small_lr)
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": small}], betas=(0.9, 0.95), weight_decay=0.0)
    first = _resume(checkpoint, terms, optimizer) if checkpoint.exists() else 0
    began = time.perf_counter()
    for step in range(first, schedule.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.rate(step)
        ids = rows[schedule.rows(step, len(rows))].to(model.device)
        # Only at step 0, also in a run that continues: counting decomposes operations, and so changes bits.
        with FlopCounterMode(display=False, custom_mapping=GROUPED) if step == 0 else nullcontext() as counter:
            loss, kl = losses(parent, model, ids, schedule)
            loss.backward()
        if counter:
            report(f"a step is {counter.get_total_flops() / 1e12:.3g} TFLOP on {ids.numel()} tokens")
        norm, done = nn.utils.clip_grad_norm_(terms.values(), 1.0), step + 1
        _check_finite(done, {"the loss": loss, "the gradients' norm": norm})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if done % schedule.save_every == 0 or done == schedule.steps:
            _check_finite(done, terms)
            _save(checkpoint, terms, optimizer, done)
        each = (time.perf_counter() - began) / (done - first)
        left = each * (schedule.steps - done) / 60
        report(
            f"step {done}/{schedule.steps}: KL {kl:.4f}, loss {loss:.4f}, {each:.2f} s/step, {left:.0f} min left"
        )


def _check_finite(step: int, found: Mapping[str, Tensor]) -> None:
    for name, value in found.items():
        if not value.isfinite().all():
            rule = "it must be finite; training has diverged, and its checkpoint is that of a step before"
            raise ModelError(
                f"step {step}: {name}", rule, "start in another folder with a lower --lr or --small-lr"
            )


def _save(file: Path, terms: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, done: int) -> None:
    moments = {f"{name} {m}": optimizer.state[term][m] for name, term in terms.items() for m in MOMENTS}
    write_sealed(file, FORMAT, {**terms, **moments}, done)


def _resume(file: Path, terms: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Read terms and optimizer state; return how many steps are done."""
    held, done = read_sealed(file, FORMAT)
    for name, term in terms.items():
        term.data.copy_(held[name])
        moments = {m: held[f"{name} {m}"].to(term.device) for m in MOMENTS}
        optimizer.state[term] = {"step": torch.tensor(float(done)), **moments}
    return int(done)
