"""The card that is measured, the base that sections share, and what a section is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from figures import Figure
from torch.profiler import ProfilerActivity, profile

from flexperts.costs.models import describe
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.memory import reset_peak
from flexperts.modeling.skeleton import auto_class
from flexperts.moe.dispatch import BY_PAIRS
from flexperts.testing import byte_tokenizer

SMALL = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "intermediate_size": 64,
    "vocab_size": 300,
    "num_experts": 8,
    "num_hidden_layers": 2,
}


@dataclass(frozen=True)
class Section:
    """One part of the tier.

    Args:
        name: Of its file, and for ``--only``.
        title, workload, notes: As for ``Benchmark``.
        seconds: Its budget.
        measure: Yields figures as they are found.
    """

    name: str
    title: str
    workload: str
    seconds: int
    measure: Callable[[Card], Iterator[Figure]]
    notes: tuple[str, ...] = ()


def section(
    title: str, workload: str, seconds: int, *notes: str
) -> Callable[[Callable[[Card], Iterator[Figure]]], Section]:
    """Return a decorator that makes a section of a function with its name."""
    return lambda measure: Section(measure.__name__, title, workload, seconds, measure, notes)


class Card:
    """The device, and how time and memory are taken on it.

    Args:
        device: The device.
        tiny: Small shapes, to try the scripts on a CPU.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny

    @property
    def on_cuda(self) -> bool:
        """Whether this is a card at all."""
        return self.device.type == "cuda"

    @property
    def described(self) -> dict[str, Any]:
        """The card's name, capability, memory and cuDNN."""
        if not self.on_cuda:
            return {"name": "no card"}
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "gigabytes": round(found.total_memory / 1e9, 1),
            "cudnn": torch.backends.cudnn.version(),
        }

    @cached_property
    def base(self) -> LoadedBase:
        """A base of Qwen1.5-MoE-A2.7B's exact shape with random weights in bf16."""
        return self.qwen()

    def qwen(self, layers: int | None = None) -> LoadedBase:
        """Return a base of that shape, or some of its layers."""
        config = describe("qwen1.5-moe-a2.7b").config
        if self.tiny:
            config.update(SMALL)
        elif layers:
            config.num_hidden_layers = layers
        with torch.device(self.device):
            model = auto_class(config).from_config(config, dtype=torch.bfloat16, experts_implementation=BY_PAIRS)
        model.requires_grad_(False).eval()
        return LoadedBase(model, byte_tokenizer(), "random", "qwen1.5-moe-a2.7b")

    def wait(self) -> None:
        """Wait until the card has done what it was given."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], repeats: int = 5, warm_up: int = 2) -> float:
        """Return the median seconds of a call."""
        return median([self._once(call) for _ in range(warm_up + repeats)][warm_up:])

    def _once(self, call: Callable[[], object]) -> float:
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def above(self, call: Callable[[], object]) -> float:
        """Return the peak of a call above what was allocated before it, in GB; 0 without a card."""
        if not self.on_cuda:
            call()
            return 0.0
        torch.cuda.empty_cache()
        reset_peak(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9

    def profiled(self, call: Callable[[], object], what: str) -> Iterator[Figure]:
        """Yield kernels, waits of the host and the card's busy share of one call."""
        if not self.on_cuda:
            return
        call()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            seconds = self._once(call)
        events = seen.key_averages()
        busy = sum(event.self_device_time_total for event in events) / 1e6
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        waits = sum(event.count for event in events if "StreamSynchronize" in event.key)
        yield Figure(f"{what}: kernels", launches, "")
        yield Figure(f"{what}: waits of the host", waits, "")
        yield Figure(f"{what}: share of time in which the card computes", 100 * busy / seconds, "%")
