"""The published way to choose experts, written from its description, and the memory of each way.

Lu et al., "Not All Experts are Equal" (ACL 2024), keep every MoE layer's inputs and outputs on the calibration
set, run each layer again for every subset of experts that could be kept, and take the one whose output is nearest.
For one expert that is N runs of the layer, with the router's choice replaced by that expert at weight 1.

    python benchmarks/performance/selection_published.py WAY     # prints the bytes that WAY adds to the loaded base
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from selection_workload import Workload, load
from torch import Tensor

from flexperts.data.prompts import Example
from flexperts.modeling.forward import autocast
from flexperts.modeling.memory import peak_bytes, reset_peak
from flexperts.moe.layout import LayerExperts, Note

Stored = list[tuple[Tensor, Tensor]]
"""Inputs and routed outputs ``[T, D]`` of one layer, for every batch."""


def choose(workload: Workload, examples: Sequence[Example]) -> list[int]:
    """Return the expert of every layer whose output alone is nearest to the layer's."""
    stored = store(workload, examples)
    with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
        return [_nearest(experts, stored[experts.name]) for experts in workload.experts]


def store(workload: Workload, examples: Sequence[Example]) -> dict[str, Stored]:
    """Store every layer's inputs and outputs on the calibration set, without padding."""
    stored: dict[str, Stored] = {experts.name: [] for experts in workload.experts}
    keep = torch.empty(0, dtype=torch.bool)

    def into(calls: Stored) -> Note:
        return lambda hidden, _index, _weights, output: calls.append((hidden[keep], output[keep]))

    handles = [handle for e in workload.experts for handle in e.watch(into(stored[e.name]))]
    for batch in workload.batches(examples):
        keep = batch["attention_mask"].bool().reshape(-1)
        workload.forward([batch])
    for handle in handles:
        handle.remove()
    return stored


def _nearest(experts: LayerExperts, calls: Stored) -> int:
    losses = []
    for number in range(experts.num_experts):
        loss = 0.0
        for hidden, output in calls:
            index = torch.full((len(hidden), 1), number)
            alone = experts.module(hidden, index, torch.ones(len(hidden), 1, dtype=hidden.dtype))
            loss += (output.float() - alone.float()).square().sum().item()
        losses.append(loss)
    return losses.index(min(losses))


def added_bytes(way: str) -> int:
    """Return how far a way's peak lies above what is resident with the base loaded and warm."""
    workload = load()
    examples = next(iter(workload.examples(0, workload.settings.graft.calibration_rows).values()))
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: workload.forward(workload.batches(examples)),
        "flexperts": lambda: workload.select(examples),
        "published": lambda: choose(workload, examples),
    }
    device = torch.device("cpu")
    reset_peak(device)
    before = peak_bytes(device) or 0
    ways[way]()
    return (peak_bytes(device) or 0) - before


if __name__ == "__main__":
    print(added_bytes(sys.argv[1]))
