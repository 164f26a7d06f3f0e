"""The cost of choosing experts to graft, compared with its matrix products, a forward pass and the published way.

python benchmarks/performance/selection.py      # about two and a half minutes on two cores
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import selection_published as published
import torch
import torch.nn.functional as F
from figures import Benchmark, Figure, parser
from selection_agreement import TokenErrors, budget_against_all, rows_against_all, token_errors
from selection_workload import Workload, load
from torch import Tensor
from training_step import stack

from flexperts.data.prompts import Example
from flexperts.modeling.forward import autocast
from flexperts.moe.experts import find_experts
from flexperts.moe.layout import LayerExperts
from flexperts.selection.selection import Probe

REPEATS, LARGE_REPEATS, LARGE_TOKENS = 9, 3, 512
"""Passes over all scored calls, each timed in three ways in turn."""
SEEDS = (0, 1)
ROWS = 96
"""Train rows of each silo where choices are compared."""
BUDGETS = (1024, 2048, 4096)
"""Token budgets besides the default one."""
CPU = torch.device("cpu")

Call = tuple[LayerExperts, Tensor, tuple[Tensor, ...]]
"""Experts, the positions to score, and their arguments and results."""
Times = dict[str, list[float]]


def main() -> None:
    """Measure and write."""
    given = parser(__doc__).parse_args()
    bench = Benchmark("selection", "Selecting experts", WORKLOAD, NOTES)
    workload = load()
    silos = workload.examples(0, workload.settings.graft.calibration_rows)
    print("matrix products", flush=True)
    products = time_products(record(workload, next(iter(silos.values()))), REPEATS)
    large = time_products(large_calls(), LARGE_REPEATS)
    print("whole selections", flush=True)
    whole, same = time_ways(workload, silos)
    memory = {way: measure_memory(way) for way in ("forward", "flexperts", "published")}
    print("choices", flush=True)
    clients = [token_errors(workload, e) for s in SEEDS for e in workload.examples(s, ROWS).values()]
    agreement = compare_choices(workload, clients)
    details = {
        "seconds_on_all_calls": products,
        "seconds_on_a_large_layer": large,
        "seconds_by_client_and_repeat": whole,
        "same_choice_as_published_percent": same,
        "bytes_above_the_loaded_base": memory,
        "agreement": agreement,
        "tokens_of_all_rows": [len(client.row) for client in clients],
    }
    bench.write(given.out, figures(workload, details), details)


def time_products(calls: list[Call], repeats: int) -> Times:
    """Time the scoring of calls, and its matrix products alone: one per expert, and in the fewest."""
    probe = Probe(pairs=False)
    score = {e.name: probe.note(e) for e in {experts.name: experts for experts, _, _ in calls}.values()}
    times: Times = {"scoring": [], "expert by expert": [], "fewest": []}
    for _ in range(repeats):
        passed = dict.fromkeys(times, 0.0)
        for experts, positions, call in calls:
            probe.positions = positions
            single, fewest = plain_products(experts, call[0].index_select(0, positions))
            passed["expert by expert"] += seconds(single)
            passed["scoring"] += seconds(lambda e=experts, c=call: score[e.name](*c))
            passed["fewest"] += seconds(fewest)
        for name, value in passed.items():
            times[name].append(value)
    return times


def record(workload: Workload, examples: list[Example]) -> list[Call]:
    """Return every call of every layer's experts on the calibration set."""
    calls: list[Call] = []
    positions = torch.empty(0, dtype=torch.long)
    handles = [
        handle
        for experts in workload.experts
        for handle in experts.watch(lambda *call, e=experts: calls.append((e, positions, call)))
    ]
    for batch in workload.batches(examples):
        positions = batch["attention_mask"].reshape(-1).nonzero().squeeze(-1)
        workload.forward([batch])
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def large_calls() -> list[Call]:
    """Return one call of one layer of Qwen1.5-MoE's shape, on random tokens."""
    (experts,) = find_experts(stack("cpu", layers=1).model)
    hidden = torch.randn(LARGE_TOKENS, experts.width, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.arange(4 * LARGE_TOKENS).view(-1, 4) % experts.num_experts
    weight = torch.full(index.shape, 0.25, dtype=hidden.dtype)
    return [(experts, torch.arange(LARGE_TOKENS), (hidden, index, weight, experts.module(hidden, index, weight)))]


def plain_products(experts: LayerExperts, hidden: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return all experts' matrix products on some tokens, one by one, and as one and a batched one."""
    up, down = experts.module.gate_up_proj.detach(), experts.module.down_proj.detach()
    intermediate = torch.ones(len(up), len(hidden), down.shape[-1], dtype=down.dtype)
    pairs = list(zip(up, down, intermediate, strict=True))

    def single() -> None:
        for u, d, h in pairs:
            F.linear(hidden, u)
            F.linear(h, d)

    return single, lambda: (F.linear(hidden, up.flatten(0, 1)), torch.bmm(intermediate, down.mT))


@torch.no_grad()
def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of ``work``, under the autocast that a run has."""
    with autocast(CPU, "bf16"):
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


def time_ways(workload: Workload, silos: dict[str, list[Example]]) -> tuple[Times, float]:
    """Time a forward pass, the selection and the published way in turn; count equal choices in percent."""
    times: Times = {"forward": [], "flexperts": [], "published": []}
    ours: dict[str, list[int]] = {}
    theirs: dict[str, list[int]] = {}
    for name, examples in [*silos.items()] * 2:
        batches = workload.batches(examples)
        for way, work in (
            ("forward", lambda b=batches: workload.forward(b)),
            ("flexperts", lambda e=examples, n=name: ours.update({n: [s.best(1)[0] for s in workload.select(e)]})),
            ("published", lambda e=examples, n=name: theirs.update({n: published.choose(workload, e)})),
        ):
            times[way].append(seconds(work))
        print(f"  {name}: " + ", ".join(f"{way} {taken[-1]:.2f} s" for way, taken in times.items()), flush=True)
    equal = [a == b for name in ours for a, b in zip(ours[name], theirs[name], strict=True)]
    return times, 100 * sum(equal) / len(equal)


def measure_memory(way: str) -> int:
    """Return what a way adds to the loaded base at its peak, in bytes, from a fresh process."""
    command = [sys.executable, str(Path(published.__file__)), way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def compare_choices(workload: Workload, clients: list[TokenErrors]) -> dict[str, Any]:
    """Return agreement by budget of tokens, on as many rows as the default reads, and by rows."""
    rows = workload.settings.graft.calibration_rows
    budgets = sorted({*BUDGETS, workload.settings.graft.calibration_tokens})
    return {
        "budgets": {str(budget): budget_against_all(clients, rows, budget).told for budget in budgets},
        "rows": {str(count): rows_against_all(clients, count).told for count in (16, 32, rows)},
    }


def ratio(over: list[float], under: list[float]) -> float:
    """Return the median of ratios taken side by side."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def figures(workload: Workload, found: dict[str, Any]) -> list[Figure]:
    """Return the page's figures."""
    products, whole, memory = (
        found[name]
        for name in ("seconds_on_all_calls", "seconds_by_client_and_repeat", "bytes_above_the_loaded_base")
    )
    large = found["seconds_on_a_large_layer"]
    extra = [(a - b) / b for a, b in zip(whole["flexperts"], whole["forward"], strict=True)]
    budgets, rows, default = found["agreement"]["budgets"], found["agreement"]["rows"], workload.settings.graft
    return [
        Figure(
            "Scoring all experts over their matrix products, expert by expert",
            ratio(products["scoring"], products["expert by expert"]),
            at_most=1.2,
            limit="Activations and inner products are memory traffic, which is much compared with products of an "
            "inner width of 96; small experts are computed together, which makes up for it.",
        ),
        Figure(
            "The same on a layer of Qwen1.5-MoE's shape: 60 experts of 1408, hidden 2048",
            ratio(large["scoring"], large["expert by expert"]),
            at_most=1.2,
            limit="The products themselves: activations and inner products are small compared with them.",
        ),
        Figure(
            "The first over its products in the fewest calls",
            ratio(products["scoring"], products["fewest"]),
            limit="The fewest calls are what scoring uses too; the rest is activations and inner products.",
        ),
        Figure(
            "Selection in addition to its forward pass, in forward passes",
            statistics.median(extra),
            at_most=1.0,
            limit="Six of 30 layers have experts here; a model with many experts in every layer is bound by "
            "graft.calibration_tokens instead.",
        ),
        Figure(
            f"Same choice with {default.calibration_tokens} tokens as with all of {default.calibration_rows} rows",
            budgets[str(default.calibration_tokens)]["equal_percent"],
            "%",
            at_least=95,
            limit="What is left out by a smaller budget decides near ties; see the details for their loss.",
        ),
        *(Figure(f"The same with {b} tokens", budgets[str(b)]["equal_percent"], "%") for b in BUDGETS),
        Figure(
            f"Same choice from {default.calibration_rows} rows as from all {ROWS}",
            rows[str(default.calibration_rows)]["equal_percent"],
            "%",
            limit="Rows, not tokens: another sample of rows has other near ties.",
        ),
        Figure(
            "Time of the published way over ours",
            ratio(whole["published"], whole["flexperts"]),
            limit="Both need the forward pass, which is most of the time on this base.",
        ),
        Figure(
            "The same without the forward pass",
            ratio(
                [a - b for a, b in zip(whole["published"], whole["forward"], strict=True)],
                [a - b for a, b in zip(whole["flexperts"], whole["forward"], strict=True)],
            ),
        ),
        Figure(
            "Memory above the loaded base, published way over ours",
            memory["published"] / memory["flexperts"],
            limit="Ours stays the same with more rows; theirs grows with them.",
        ),
    ]


WORKLOAD = (
    "`smol-moe` in bf16 (six MoE layers of eight experts), four shipped silos, graft.calibration_rows and "
    "graft.calibration_tokens at their defaults, batches of two rows."
)
NOTES = (
    "Times are wall times, ways taken in turn in one process; ratios are medians of ratios taken side by side.",
    "Choices are compared over silos, layers, two seeds of the silos, and four draws of rows and tokens each.",
    "The published way is ours from its description: it is given one forward pass for all layers, keeps no padding "
    "and stores in the model's type.",
    "Memory is the peak resident size of a fresh process above what it is with the base loaded and warm.",
)

if __name__ == "__main__":
    main()
