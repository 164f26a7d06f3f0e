"""Measured costs of K + 1 experts: time of a training step, of prefill and of a decoded token, memory, FLOPs.

Variants take turns on one resident base, every other round in reverse order, so that a slow phase of the machine
affects all of them. The first round is a warm-up and does not count; results are medians of the other rounds.
Compare ratios within one table, not seconds of two tables.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flexperts.client.model import ClientModel
from flexperts.config.run import RunConfig
from flexperts.costs.models import experts_per_token
from flexperts.costs.rounds import planned_sites
from flexperts.data.prompts import Example
from flexperts.methods.registry import make_method
from flexperts.modeling.forward import autocast, last_logits
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.memory import peak_bytes, reset_peak
from flexperts.parameters.split import ParameterSplit
from flexperts.recipe import parse_recipe
from flexperts.seeding import generator
from flexperts.training.local import LocalSettings, train_local

UNTOUCHED, REFERENCE = "untouched base", "fedavg (attention LoRA)"
VARIANTS: dict[str, tuple[str, ...] | None] = {
    UNTOUCHED: None,
    REFERENCE: ("method.name=fedavg",),
    "flex, k = 1": ("method.name=flex", "graft.experts=1"),
    "flex, k = 2": ("method.name=flex", "graft.experts=2"),
    "flex, k = 1, rank 32": ("method.name=flex", "graft.experts=1", "graft.rank=32"),
    "fedavg_experts (LoRA everywhere)": ("method.name=fedavg_experts",),
    "moe_fedavg (all experts)": ("method.name=moe_fedavg",),
}
"""Name -> settings; None means the unchanged base."""


@dataclass(frozen=True)
class Workload:
    """The measured workload.

    Args:
        rows: Rows of a batch, in training and at inference.
        prompt, response: Tokens of every row, all random.
        new_tokens: Tokens that are decoded after the prompt.
        steps: Optimizer steps of a measured training.
        repeats: Rounds that count.
        seed: Seed of the tokens.
    """

    rows: int = 4
    prompt: int = 192
    response: int = 64
    new_tokens: int = 8
    steps: int = 2
    repeats: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Speed:
    """A variant's medians.

    Args:
        name: The variant.
        trained: Number of trained parameters.
        step: Seconds of an optimizer step, with the optimizer's creation; None if nothing is trained.
        prefill: Seconds of the prompts' forward pass.
        decode: Seconds per decoded token, for all rows together.
        peak_memory: Peak in training (for the base: in generation), in bytes, of the device on CUDA and of the
            process on a CPU; None where it is unknown.
        flops_per_token: FLOPs of the prompts' forward pass, from ``counted_flops``.
    """

    name: str
    trained: int
    step: float | None
    prefill: float
    decode: float
    peak_memory: int | None
    flops_per_token: float


@dataclass
class _Times:
    step: list[float]
    prefill: list[float]
    decode: list[float]
    peak: list[int | None]


def measure(
    base: LoadedBase,
    workload: Workload | None = None,
    variants: dict[str, tuple[str, ...] | None] | None = None,
    settings: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> list[Speed]:
    """Measure variants on a base in memory, which is unchanged afterwards.

    Args:
        base: The base, in memory.
        workload: The workload; ``Workload()`` by default.
        variants: Name -> settings, or None for the base itself; ``VARIANTS`` by default.
        settings: Overrides for all variants.
        report: Called with a line for every measured variant.
    """
    work, variants = workload or Workload(), VARIANTS if variants is None else variants
    times = {name: _Times([], [], [], []) for name in variants}
    facts: dict[str, tuple[int, float]] = {}
    for number in range(work.repeats + 1):
        for name, own in list(variants.items())[:: -1 if number % 2 else 1]:
            with set_up(base, own, settings) as (model, split, config):
                if name not in facts:
                    trained = sum(p.numel() for p in split.trained.values()) if split else 0
                    facts[name] = trained, counted_flops(model, _prompts(base, work))
                _measure_once(base, model, split, config, work, times[name], keep=number > 0)
            report(f"round {number} of {work.repeats}: {name}")
    return [_medians(name, *facts[name], times[name]) for name in variants]


@torch.no_grad()
def counted_flops(model: Any, input_ids: torch.Tensor) -> float:
    """Return the FLOPs per token that torch counts in a forward pass over ``input_ids [B, S]``."""
    return count(model, lambda: model(input_ids=input_ids, use_cache=False)) / input_ids.numel()


def count(model: Any, call: Callable[[], object]) -> float:
    """Return the FLOPs that torch counts while ``call`` runs.

    Experts run in transformers' eager loop meanwhile, because torch does not count fused ones. Attention over the
    context is counted only where torch supports the kernel: eager attention always, fused kernels on CUDA.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._experts_implementation
    base.set_experts_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        base.set_experts_implementation(before)
    return float(counter.get_total_flops())


@contextmanager
def set_up(
    base: LoadedBase, own: tuple[str, ...] | None, settings: Sequence[str] = ()
) -> Iterator[tuple[Any, ParameterSplit | None, RunConfig]]:
    """Yield the model as a variant trains it; the choice of grafted experts does not affect time."""
    config = parse_recipe("data.silos = {}", [*settings, *(own or ())])
    if own is None:
        yield base.model, None, config
        return
    model = ClientModel(base, config, make_method(config.method))
    try:
        (site,) = planned_sites(model, ["client"], experts_per_token(base.model.config)).values()
        with model.lend(site, {}) as (split, _):
            yield model.lora.model, split, config
    finally:
        model.close()
        gc.collect()


def _measure_once(
    base: LoadedBase,
    model: Any,
    split: ParameterSplit | None,
    config: RunConfig,
    work: Workload,
    times: _Times,
    *,
    keep: bool,
) -> None:
    prompts, precision = _prompts(base, work), config.model.precision
    reset_peak(prompts.device)
    step = _timed(prompts.device, lambda: train(model, split, config, work)) / work.steps if split else None
    trained_peak = peak_bytes(prompts.device)
    model.eval()
    with torch.no_grad(), autocast(prompts.device, precision):
        mask = torch.ones_like(prompts)
        prefill = _timed(prompts.device, lambda: last_logits(model, prompts, mask, padded=False, keep=1))
        both = _timed(prompts.device, lambda: _decode(model, prompts, work.new_tokens))
    if keep:
        times.step.extend([] if step is None else [step])
        times.prefill.append(prefill)
        times.decode.append(max(0.0, both - prefill) / work.new_tokens)
        times.peak.append(trained_peak if split else peak_bytes(prompts.device))


def train(
    model: Any,
    split: ParameterSplit,
    config: RunConfig,
    work: Workload,
    on_step: Callable[[float, int], None] = lambda loss, tokens: None,
) -> None:
    """Train for ``work.steps`` steps on random tokens, as a client does; ``on_step`` is called after each."""
    settings = LocalSettings(
        training=config.training.model_copy(update={"batch_size": work.rows}),
        precision=config.model.precision,
        pad_token_id=0,
        steps=work.steps,
        total_steps=work.steps,
    )
    tokens = _random(model, work, work.prompt + work.response).tolist()
    examples = [Example(tuple(row), work.prompt) for row in tokens]
    train_local(model, split, examples, settings, generator(work.seed, "speed"), on_step)


def _decode(model: Any, prompts: torch.Tensor, count: int) -> None:
    """Decode ``count`` tokens after the first one, which the prompt's forward pass gives."""
    mask = torch.ones_like(prompts)
    logits, cache = last_logits(model, prompts, mask, padded=False, keep=1)
    for _ in range(count):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits, cache = last_logits(model, logits[:, -1:].argmax(-1), mask, cache, padded=False, keep=1)


def _prompts(base: LoadedBase, work: Workload) -> torch.Tensor:
    return _random(base.model, work, work.prompt).to(next(base.model.parameters()).device)


def _random(model: Any, work: Workload, columns: int) -> torch.Tensor:
    size = (work.rows, columns)
    return torch.randint(model.config.get_text_config().vocab_size, size, generator=generator(work.seed, "tokens"))


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _medians(name: str, trained: int, flops: float, times: _Times) -> Speed:
    peaks = [peak for peak in times.peak if peak is not None]
    return Speed(
        name,
        trained,
        median(times.step) if times.step else None,
        median(times.prefill),
        median(times.decode),
        int(median(peaks)) if peaks else None,
        flops,
    )
