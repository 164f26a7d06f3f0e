"""A training step of FLEx against one of LoRA on attention alone: time, peak memory, counted FLOPs.

    python benchmarks/performance/training_step.py
    python benchmarks/performance/training_step.py --device cuda --experts grouped_mm
    python benchmarks/performance/training_step.py --device cuda --compile --warm-up 3

The methods take turns on one resident base, visit by visit, every other visit in reverse order; a visit sets the
client's model up, trains a few steps that do not count, then some that do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
from figures import Benchmark, Figure, parser
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import flexperts.modeling.lora
from flexperts.config.model import ModelConfig
from flexperts.costs.models import describe
from flexperts.costs.speed import Workload, count, set_up, train
from flexperts.modeling.load import LoadedBase, load_base
from flexperts.modeling.memory import peak_bytes, reset_peak

TARGET = 1.12
WORKLOAD = (
    "FLEx with one personal expert per MoE layer (a trained copy, the default, or low-rank updates of rank 8) "
    "against LoRA on attention alone; in all of them LoRA of rank 8 on q, k and v, AdamW, bf16 autocast. The bases "
    "are smol-moe, and two layers of Qwen1.5-MoE-A2.7B's shape (60 experts of 1408, top-4, hidden 2048) with "
    "random weights in bf16."
)
NOTES = (
    "Ratios of medians; the methods took turns. A step is batch, forward, backward, clipping and optimizer. FLOPs "
    "are those that torch counts in a whole step, forward and backward, with attention over the context.",
    "A frozen matrix costs two products in a step (the output, and the gradient of the input), a trained copy a "
    "third.",
    "Time outside matrix products is the profiler's, of whole steps in one process; attention's kernel counts "
    "as products. Plain layers are those of transformers and PEFT as they are.",
)
OUTSIDE = 30
"""Target for the time outside matrix products, in percent."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
QUICK_START = Workload(rows=2, prompt=68, response=19, steps=6)
"""The quick start's batch size and its mean lengths."""
UNTRIED = "The options for a GPU (`--device cuda`, with `--experts` or `--compile`) are untried."
LORA, FULL, LOW_RANK = "LoRA", "FLEx, trained copy", "FLEx, rank 8"
METHODS = {
    LORA: ("method.name=fedavg",),
    FULL: ("method.name=flex", "graft.experts=1"),
    LOW_RANK: ("method.name=flex", "graft.experts=1", "graft.rank=8"),
}
"""Name -> settings; LoRA on q, k, v with rank 8 is the recipes' default in all of them."""
SMOL, STACK = "smol-moe", "two layers of Qwen1.5-MoE"
SHAPES = {
    SMOL: (Workload(rows=4, prompt=48, response=12), Workload(rows=4, prompt=192, response=64)),
    STACK: (Workload(rows=4, prompt=48, response=16), Workload(rows=4, prompt=96, response=32)),
}


@dataclass(frozen=True)
class Measured:
    """One method on one shape: every counted step in seconds, peaks in bytes, the FLOPs of a step."""

    seconds: list[float]
    peaks: list[int]
    flops: float


def measure(base: LoadedBase, work: Workload, given: argparse.Namespace) -> dict[str, Measured]:
    """Return what each method takes on one shape."""
    found = {name: Measured([], [], step_flops(base, own, work)) for name, own in METHODS.items()}
    for visit in range(given.visits):
        for name in list(METHODS)[:: -1 if visit % 2 else 1]:
            if given.compile:
                torch.compiler.reset()  # every visit has new modules
            seconds, peak = steps(base, METHODS[name], work, given.warm_up)
            found[name].seconds.extend(seconds)
            found[name].peaks.extend([] if peak is None else [peak])
            print(f"  visit {visit + 1} of {given.visits}: {name}, {median(seconds):.3f} s a step", flush=True)
    return found


def steps(base: LoadedBase, own: tuple[str, ...], work: Workload, warm_up: int) -> tuple[list[float], int | None]:
    """Return the seconds of every step after the first ``warm_up``, and the peak memory of all."""
    device = next(base.model.parameters()).device
    # Every step waits for its loss, so the time from one end to the next is a step's on a GPU as well.
    ends: list[float] = []
    with set_up(base, own) as (model, split, config):
        reset_peak(device)
        train(
            model,
            split,
            config,
            replace(work, steps=warm_up + work.steps),
            lambda _loss, _tokens: ends.append(time.perf_counter()),
        )
        return [after - before for before, after in pairwise(ends[warm_up - 1 :])], peak_bytes(device)


def step_flops(base: LoadedBase, own: tuple[str, ...], work: Workload) -> float:
    """Return the FLOPs of one step's matrix products, forward and backward, attention included."""
    before = base.model.config._attn_implementation
    base.model.set_attn_implementation("eager")  # torch does not count the fused kernel of a CPU
    try:
        with torch.compiler.set_stance("force_eager"), set_up(base, own) as (model, split, config):
            return count(base.model, lambda: train(model, split, config, replace(work, steps=1)))
    finally:
        base.model.set_attn_implementation(before)


def outside_products(base: LoadedBase, visits: int) -> tuple[list[Figure], dict[str, Any]]:
    """Return the share of a FLEx step outside matrix products, with the faster layers and with plain ones."""
    shares: dict[str, list[float]] = {"faster": [], "plain": []}
    seconds: dict[str, list[float]] = {"faster": [], "plain": []}
    for visit in range(visits):
        for layers in list(shares)[:: -1 if visit % 2 else 1]:
            with plain_layers() if layers == "plain" else nullcontext():
                seconds[layers].extend(steps(base, METHODS[FULL], QUICK_START, 1)[0])
                shares[layers].append(profiled_share(base, QUICK_START))
    what = f"{FULL}, {SMOL}, {QUICK_START.rows} rows of {QUICK_START.prompt + QUICK_START.response} tokens"
    limit = "Element-wise operations, each of which reads and writes memory, and what torch spends to call them."
    found = [
        Figure(
            f"time outside matrix products: {what}", median(shares["faster"]), "%", at_most=OUTSIDE, limit=limit
        ),
        Figure("the same with plain layers", median(shares["plain"]), "%"),
        Figure(f"time of a step over plain layers: {what}", median(seconds["faster"]) / median(seconds["plain"])),
    ]
    return found, {"shares": shares, "seconds": seconds}


def profiled_share(base: LoadedBase, work: Workload) -> float:
    """Return the percentage of the profiled time of a FLEx client's steps that is outside matrix products."""
    with set_up(base, METHODS[FULL]) as (model, split, config):
        train(model, split, config, work)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train(model, split, config, work)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    names = {f"aten::{name}" for name in PRODUCTS}
    products = sum(time for key, time in times.items() if key in names or "scaled_dot_product_flash" in key)
    return float(100 * (1 - products / sum(times.values())))


@contextmanager
def plain_layers() -> Iterator[None]:
    """Leave all layers to transformers and PEFT inside the block."""
    with patch.object(flexperts.modeling.lora, "JoinedLora", Mock()):
        yield


def bases(given: argparse.Namespace) -> Iterator[tuple[str, LoadedBase]]:
    """Yield name and model of each requested base; one is in memory at a time."""
    makers = {
        SMOL: lambda: load_base(ModelConfig(base="smol-moe", device=given.device)),
        STACK: lambda: stack(given.device),
    }
    for name in given.only:
        base = makers[name]()
        if given.experts:
            base.model.set_experts_implementation(given.experts)
        if given.compile:
            base.model.compile()
        yield name, base


def stack(device: str, layers: int = 2) -> LoadedBase:
    """Return layers of Qwen1.5-MoE-A2.7B's shape with random weights and a small vocabulary."""
    config = describe("qwen1.5-moe-a2.7b").config
    config.update({"num_hidden_layers": layers, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    return LoadedBase(model, SimpleNamespace(pad_token_id=0), "random", STACK)


def figures(base: str, work: Workload, found: dict[str, Measured]) -> Iterator[Figure]:
    """Yield both ratios of both forms of FLEx."""
    reference = found[LORA]
    for name in (FULL, LOW_RANK):
        of, flops = found[name], found[name].flops / reference.flops
        what = f"{name} over LoRA, {base}, {work.rows} rows of {work.prompt + work.response} tokens"
        yield Figure(
            f"time of a step: {what}",
            median(of.seconds) / median(reference.seconds),
            at_most=TARGET,
            limit=f"its matrix products alone are {flops:.3f} times LoRA's FLOPs",
        )
        if of.peaks and reference.peaks:
            yield Figure(
                f"peak memory: {what}",
                median(of.peaks) / median(reference.peaks),
                limit="the personal parameters with their gradients and the optimizer's two moments, in fp32",
            )


def main() -> None:
    """Measure, and write the result."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--experts", choices=("grouped_mm", "eager"), help="how routed experts are computed")
    options.add_argument("--compile", action="store_true", help="run the base under torch.compile")
    options.add_argument("--visits", type=int, default=4)
    options.add_argument("--warm-up", type=int, default=1, help="steps of a visit that do not count, at least 1")
    options.add_argument("--only", choices=list(SHAPES), nargs="*", default=list(SHAPES))
    given = options.parse_args()
    benchmark = Benchmark(
        "training_step", "Training step", WORKLOAD, NOTES + ((UNTRIED,) if given.device == "cpu" else ())
    )
    measured, details = [], []
    for name, base in bases(given):
        for work in SHAPES[name]:
            print(f"{name}, {work.rows} x {work.prompt + work.response} tokens", flush=True)
            found = measure(base, work, given)
            measured += figures(name, work, found)
            methods = {method: asdict(one) for method, one in found.items()}
            details.append({"base": name, "workload": asdict(work), "methods": methods})
        if name == SMOL and given.device == "cpu":
            outside, raw = outside_products(base, given.visits)
            measured += outside
            details.append({"base": name, "workload": asdict(QUICK_START), "outside_products": raw})
    benchmark.write(given.out, measured, details)


if __name__ == "__main__":
    main()
