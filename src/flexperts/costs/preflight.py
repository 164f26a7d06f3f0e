"""Check before a run that it fits this machine's memory, and which settings would reduce its memory.

Weights, trained values, gradients and moments come from the plan, which runs the method's code on the meta device;
activations are estimated from the model's shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexperts.config.run import RunConfig
from flexperts.costs.activations import Activations, Lengths
from flexperts.costs.models import Description, describe, meta_base
from flexperts.costs.plan import MethodPlan, model_facts, plan_method
from flexperts.errors import FlexpertsError, ModelError
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.memory import free_bytes
from flexperts.modeling.placement import computing_device, placement, upwards
from flexperts.modeling.quantization import planned_bytes
from flexperts.parameters.fingerprint import stored_bytes
from flexperts.recipe import parse_recipe
from flexperts.smol_moe.build import resolve_base

PROCESS = 600_000_000
"""Resident bytes of Python, torch, transformers and Flower before any base is loaded."""
_KNOBS = (
    "model.dtype=bfloat16",
    "model.quantization=int8",
    "model.quantization=nf4",
    "training.gradient_checkpointing=true",
    "training.micro_batch_size=1",
    "graft.rank=32",
    "graft.calibration_tokens=512",
    "evaluation.batch_size=4",
)
"""Settings that can reduce memory; each is tried separately."""


@dataclass(frozen=True)
class Need:
    """Peak memory of one phase of a run.

    Args:
        phase: selection, training or evaluation.
        parts: Kind of memory -> bytes.
    """

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Preflight:
    """A silo's memory, which is also that of a run in one process, where all silos use one base in turn.

    Args:
        base: Bytes of the frozen weights in ``model.dtype``.
        needs: Memory of each phase.
        server: Bytes of a separate server: no base, but the shared weights, their mean and one update.
        device: The computing device.
        free: Free bytes of the device.
        clients: Number of clients.
    """

    base: int
    needs: tuple[Need, ...]
    server: int
    device: str
    free: int
    clients: int

    @property
    def peak(self) -> Need:
        """The phase that needs most memory."""
        return max(self.needs, key=lambda need: need.total)

    @property
    def workers(self) -> int:
        """Worker processes that fit, at least 1: they share the base, and each needs the rest of the peak."""
        base = self.peak.parts["base"]
        return max(1, (self.free - base) // (self.peak.total - base))


class Estimator:
    """Estimator of the memory of runs of one base.

    Args:
        base: The base's name in the recipe.
        clients: Names of the clients.
        lengths: The longest row; if None, ``training.max_length``, of which half is the response.
    """

    def __init__(self, base: str, clients: Sequence[str], lengths: Lengths | None = None) -> None:
        self.description = describe(resolve_base(base))
        self.clients, self.lengths = list(clients), lengths

    def estimate(self, config: RunConfig) -> Preflight:
        """Return a run's memory."""
        model = meta_base(self.description, config.model.dtype)
        facts = model_facts(self.description, model)
        device = computing_device(config.model.device)
        stored = on_device(config, self.description, model, device)
        longest = config.training.max_length
        passing = Activations(
            model.model, config, self.lengths or Lengths(longest, longest // 2), facts.experts_per_token
        )
        planned = plan_method(model, facts, config, self.clients, bandwidth=1.0)
        needs = tuple(phases(stored, planned, passing, config, device))
        return Preflight(
            facts.weights, needs, PROCESS + 12 * planned.shared, str(device), free_bytes(device), len(self.clients)
        )

    def savings(self, config: RunConfig) -> dict[str, int]:
        """Return the settings that lower the peak, each by itself, and the saved bytes, largest first."""
        before, found = self.estimate(config).peak.total, {}
        for setting in _KNOBS:
            try:
                device = f"model.device={config.model.device}"  # a recipe's text has none
                saved = before - self.estimate(parse_recipe(config.to_toml(), [device, setting])).peak.total
            except FlexpertsError:
                continue  # not compatible with the run's other settings
            if saved > before // 100:
                found[setting] = saved
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def check_fits(made: Preflight, savings: dict[str, int]) -> None:
    """Refuse a run that does not fit into memory.

    Args:
        made: The run's memory.
        savings: Setting -> saved bytes, from ``Estimator.savings``.
    """
    if made.peak.total <= made.free:
        return
    knobs = [f"{setting} saves {gigabytes(saved)}" for setting, saved in savings.items()]
    knobs.append("model.device_map = 'auto' keeps experts on disk")
    raise ModelError(
        f"this run needs {gigabytes(made.peak.total)} on {made.device} in {made.peak.phase}",
        f"{gigabytes(made.free)} are free",
        f"reduce memory ({'; '.join(knobs)}), or set model.preflight = false to try anyway",
    )


def with_workers_that_fit(config: RunConfig, made: Preflight) -> RunConfig:
    """Return a run with at most as many worker processes as fit, if it leaves their number open.

    Args:
        config: The run.
        made: Its memory.

    Raises:
        ModelError: It asks for more.
    """
    asked, fit = config.engine.workers, made.workers
    if made.device != "cpu" or asked == 1 or (asked == "auto" and fit >= torch.get_num_threads()):
        return config
    if asked == "auto":
        fit = min(fit, config.federation.drawn(made.clients))
        return config.model_copy(update={"engine": config.engine.model_copy(update={"workers": fit})})
    if asked > fit:
        raise ModelError(
            f"engine.workers = {asked}",
            f"each needs {gigabytes(made.peak.total - made.peak.parts['base'])} beside the base, and "
            f"{gigabytes(made.free)} are free",
            f"lower it to {fit}, or set model.preflight = false to try anyway",
        )
    return config


def gigabytes(value: int) -> str:
    """Return bytes as text in GB (10^9 bytes)."""
    return f"{value / 1e9:.1f} GB"


def phases(
    stored: int, planned: MethodPlan, passing: Activations, config: RunConfig, device: torch.device
) -> Iterator[Need]:
    """Yield the memory of a run's phases on a device, with ``stored`` bytes of base."""
    memory, on_cpu = planned.memory, device.type == "cpu"
    held = {"base": stored} | ({"process": PROCESS} if on_cpu else {})
    # A client's stored state is memory-mapped from its file during its turn.
    added = {"adapters, personal experts": memory.added, "stored state": planned.personal_state if on_cpu else 0}
    if planned.personal:
        yield Need("selection", held | {"activations": passing.selection(on_cpu=on_cpu)})
    yield Need(
        "training",
        held
        | added
        | {
            "gradients": memory.gradients,
            "optimizer": memory.moments,
            "activations": passing.training(torch.float32.itemsize * planned.personal),
            "logits": passing.logits(0, trained=True),
        },
    )
    scored = passing.logits(config.evaluation.batch_size, trained=False, on_cpu=on_cpu)
    yield Need("evaluation", held | added | {"activations": passing.evaluation(), "logits": scored})


def on_device(config: RunConfig, described: Description, base: LoadedBase, device: torch.device) -> int:
    """Return the bytes of the base on the computing device in training.

    A card also holds the experts that it computes with: one layer's at a time with gradient checkpointing, else
    all, because autograd keeps them.
    """
    whole: int = planned_bytes(base.model, config.model.quantization)
    offloads = config.model.device_map is not None
    if not offloads or (device.type != "cpu" and not config.training.gradient_checkpointing):
        return whole
    places: dict[str, Any] = placement(config.model, described.config, device)["device_map"]
    elsewhere: Counter[str] = Counter()
    for name, parameter in base.model.named_parameters():
        module = next(up for up in upwards(name) if up in places)
        if places[module] != str(device):
            elsewhere[module] += stored_bytes(parameter)
    fetched = device.type != "cpu" and {"cpu", "disk"} & set(places.values())
    return whole - elsewhere.total() + (max(elsewhere.values(), default=0) if fetched else 0)
