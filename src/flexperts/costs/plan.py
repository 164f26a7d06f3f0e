"""Planned costs of every method on a model, from the model's config only: no weights are loaded or allocated.

The methods' code runs on the meta device, so that a plan agrees with a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from flexperts.client.model import ClientModel
from flexperts.communication.compression import packed_bytes
from flexperts.communication.traffic import mean_groups
from flexperts.config.run import RunConfig
from flexperts.costs.flops import added_flops, base_flops
from flexperts.costs.models import Description, describe, experts_per_token, meta_base
from flexperts.costs.rounds import (
    RoundBytes,
    mean_keys,
    mean_packed,
    mean_received,
    mean_total,
    planned_rounds,
    planned_sites,
)
from flexperts.errors import ConfigError, FlexpertsError
from flexperts.methods.kit.candidates import candidates_of
from flexperts.methods.kit.method import Method
from flexperts.methods.registry import make_method, method_names
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.quantization import planned_bytes
from flexperts.moe.experts import find_experts
from flexperts.moe.quantized import Scheme
from flexperts.moe.router import find_router
from flexperts.protection.pipeline import check_enough, checked_method
from flexperts.recipe import parse_recipe

_FP32 = 4
_PAIRS = "with objective dpo a step reads both answers of a row, and once more with the base alone"
DEFAULT_ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("flex, whole expert", "flex", ("graft.rank=full",)),
    ("flex, rank 32", "flex", ("graft.rank=32",)),
    ("local", "local", ()),
    ("fedavg", "fedavg", ()),
    ("fedavg_experts", "fedavg_experts", ()),
    ("moe_fedavg", "moe_fedavg", ()),
)
"""(row's name, method, settings) of a plan without method names."""
DENSE = "dense weights, whole"
"""Name of a row that is not a method of this package: averaging all weights except routed experts and routers."""


def plan(
    model: str,
    methods: Sequence[str] = (),
    settings: Iterable[str] = (),
    *,
    clients: int = 4,
    bandwidth: float = 100.0,
) -> Plan:
    """Plan methods on a model.

    Args:
        model: As for ``describe``.
        methods: Method names, or ``["all"]``; empty plans ``DEFAULT_ROWS`` and ``DENSE``.
        settings: Overrides of a recipe's defaults, such as ``"lora.rank=16"``.
        clients: Number of clients that take part.
        bandwidth: Mbit/s of each client's link, in each direction.
    """
    if clients < 1 or not 0 < bandwidth < math.inf:  # nan is neither
        wrong = f"clients = {clients}" if clients < 1 else f"bandwidth = {bandwidth}"
        raise ConfigError(wrong, "it must be finite and above 0", "give such a value")
    given = list(settings)
    description = describe(model)
    base = meta_base(description, _config(given).model.dtype)
    facts = model_facts(description, base, _config(given).model.quantization)
    plans: list[MethodPlan] = []
    refused: dict[str, str] = {}
    for name, method, own in _rows(methods):
        try:
            config = _config([*given, f"method.name={method}", *own])
            check_enough(config, clients)
            plans.append(plan_method(base, facts, config, _clients(config, clients), bandwidth, name))
        except FlexpertsError as error:
            if "all" not in methods:
                raise
            refused[name] = str(error)
    if not methods:
        plans.append(_dense(base, facts, _config(given), clients, bandwidth))
    return Plan(facts, clients, bandwidth, tuple(plans), refused)


def _clients(config: RunConfig, count: int) -> list[str]:
    """Return names of so many clients, those that the method's options name among them."""
    named = make_method(config.method).named_clients()
    if len(named) > count:
        rule, remedy = f"method.options names {len(named)} clients", f"plan with clients = {len(named)} or more"
        raise ConfigError(f"clients = {count}", rule, remedy)
    others = (f"client-{number}" for number in range(1, count + 1))
    return list(dict.fromkeys([*named, *others]))[:count]


def model_facts(
    description: Description, base: LoadedBase, quantization: Literal["none"] | Scheme = "none"
) -> ModelFacts:
    """Return the numbers of a base without adapters, with its experts stored as ``quantization`` says."""
    experts, top_k = find_experts(base.model), experts_per_token(description.config)
    values = sum(p.numel() for p in base.model.parameters())
    idle = sum(_values(e.stored) * (1 - top_k / e.num_experts) for e in experts)
    return ModelFacts(
        name=description.name,
        note=description.note,
        parameters=values,
        active_parameters=round(values - idle),
        weights=planned_bytes(base.model, quantization),
        moe_layers=len(experts),
        experts=experts[0].num_experts,
        experts_per_token=top_k,
        flops_per_token=base_flops(base.model, top_k),
    )


def plan_method(
    base: LoadedBase,
    facts: ModelFacts,
    config: RunConfig,
    clients: Sequence[str],
    bandwidth: float,
    name: str = "",
) -> MethodPlan:
    """Plan the method of a recipe.

    Args:
        base: The model on the meta device, without adapters.
        facts: The model's numbers.
        config: The run; its data and model sections are not used.
        clients: Names of the clients.
        bandwidth: Mbit/s.
        name: The row's name; the method's by default.
    """
    method = checked_method(config)
    method.check_clients(clients)
    model = ClientModel(base, config, method)
    try:
        sites = planned_sites(model, clients, facts.experts_per_token)
        rounds = planned_rounds(model, sites)
        with model.lend(next(iter(sites.values())), {}) as (split, parts):
            shared, personal = (_values(group.values()) for group in (split.shared, split.personal))
            kept = config.training.moments(method.moments) == "kept"
            moments = 2 * personal + len(split.personal) if kept else 0  # and a number of steps per tensor
            own = [*model.lora.parameters().values(), *(p for part in parts.values() for p in part.parameters())]
            flops = facts.flops_per_token + added_flops(model, parts, facts.experts_per_token)
    finally:
        model.close()
    up, down = mean_groups(r.uplink for r in rounds), mean_groups(r.downlink for r in rounds)
    sent, received = mean_packed(rounds), mean_received(rounds) + mean_keys(rounds)
    pairs = _PAIRS if config.training.objective == "dpo" else ""
    return MethodPlan(
        name=name or method.name,
        method=method.name,
        shared=shared,
        personal=personal,
        uplink=sent,
        downlink=received,
        uplink_groups=up,
        downlink_groups=down,
        memory=_memory(facts, config, _values(own), shared + personal),
        personal_state=_FP32 * (personal + moments),
        flops_per_token=flops,
        overhead=flops / facts.flops_per_token - 1,
        seconds=_seconds(sent + received, bandwidth),
        at_server=mean_total(rounds),
        note="; ".join(filter(None, (method.plan_note, _floor_note(config, method), pairs))),
        rounds=tuple(rounds),
        run_up=sum(sum(each.messages.up.values()) for each in rounds),
        run_down=sum(sum(each.messages.down.values()) for each in rounds),
        run_seconds=sum(_seconds(each.messages.most, bandwidth) for each in rounds),
    )


def _floor_note(config: RunConfig, method: Method) -> str:
    """Return what a floor adds to the costs of a run."""
    if config.floor is None:
        return ""
    names = candidates_of(method, config)
    rounds = f"{method.turns(config)} more rounds of training by {method.alone} at each client, nothing sent; "
    return f"floor: {rounds if 'local' in names else ''}up to {len(names)} models read validation and test rows"


def _dense(base: LoadedBase, facts: ModelFacts, config: RunConfig, clients: int, bandwidth: float) -> MethodPlan:
    """Plan FedAvg of all weights outside of routed experts and routers, trained as fp32 copies."""
    experts = find_experts(base.model)
    left_out = sum(_values(e.stored) + find_router(base.model, e).weight.numel() for e in experts)
    values = facts.parameters - left_out
    size, sent = float(_FP32 * values), float(packed_bytes(values, config.compression))
    received = float(packed_bytes(values, config.compression.down))  # of one version
    return MethodPlan(
        name=DENSE,
        method="",
        shared=values,
        personal=0,
        uplink=sent,
        downlink=received,
        uplink_groups={"dense weights": size},
        downlink_groups={"dense weights": size},
        memory=_memory(facts, config, values, values),
        personal_state=0,
        flops_per_token=facts.flops_per_token,
        overhead=0.0,
        seconds=_seconds(sent + received, bandwidth),
        at_server=(sent + received) * clients,
        note="not a method of flexperts; all weights except routed experts and routers",
    )


def _memory(facts: ModelFacts, config: RunConfig, added: int, trained: int) -> Memory:
    moments = 2 * trained if config.training.optimizer == "adamw" else 0
    return Memory(facts.weights, _FP32 * added, _FP32 * trained, _FP32 * moments)


def _seconds(size: float, bandwidth: float) -> float:
    return 8 * size / (bandwidth * 1e6)


def _values(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _config(settings: Iterable[str]) -> RunConfig:
    return parse_recipe("data.silos = {}", settings)


def _rows(methods: Sequence[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    if not methods:
        yield from DEFAULT_ROWS
    for name in method_names() if "all" in methods else methods:
        yield name, name, ()


@dataclass(frozen=True)
class ModelFacts:
    """A model in numbers.

    Args:
        name, note: As in the model's description.
        parameters: Number of all parameters.
        active_parameters: Number without the routed experts that a token does not use; embeddings included.
        weights: Bytes of the frozen weights as stored.
        moe_layers, experts, experts_per_token: Number of layers with routed experts; N and K of each.
        flops_per_token: FLOPs of a forward pass, see ``flops``.
    """

    name: str
    note: str
    parameters: int
    active_parameters: int
    weights: int
    moe_layers: int
    experts: int
    experts_per_token: int
    flops_per_token: float


@dataclass(frozen=True)
class Memory:
    """A client's memory in training, in bytes, without activations, which depend on rows and kernels.

    Args:
        weights: The frozen base.
        added: fp32 values of adapters and parts, trained or not.
        gradients: fp32 gradients of the trained parameters.
        moments: The optimizer's two fp32 moments of the trained parameters; 0 for SGD.
    """

    weights: int
    added: int
    gradients: int
    moments: int
    total: int = field(init=False)
    """Sum of all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.weights + self.added + self.gradients + self.moments)


@dataclass(frozen=True)
class MethodPlan:
    """A method's costs for one client; bytes are means over the messages that hold weights.

    Args:
        name, method: The row's name, and the method's, which is empty for ``DENSE``.
        shared, personal: Numbers of trained parameters.
        uplink, downlink: Payload bytes of a client in a round with weights.
        uplink_groups, downlink_groups: The same by tensor group, before packing.
        memory: Memory in training.
        personal_state: Bytes on disk of one of the two stored states of the personal parameters, with kept moments.
        flops_per_token: FLOPs of a forward pass with everything that the method adds.
        overhead: The added FLOPs as a share of the base's.
        seconds: Time to send both payloads of a round over the client's link.
        at_server: Payload bytes of a round, all participants, both directions; a mean over the rounds in which
            clients send weights.
        note: How a run can differ from the plan, or an empty text.
        rounds: The payloads, round by round.
        run_up, run_down: Encoded bytes of all messages of all rounds with their evaluations, as a run's ledger
            counts them; joining is not in them, nor the headers of secure aggregation's exchanges.
        run_seconds: Time of these messages, each client over its own link, in every round until the last one has
            sent. 0 for ``DENSE``, as ``run_up`` and ``run_down``.
    """

    name: str
    method: str
    shared: int
    personal: int
    uplink: float
    downlink: float
    uplink_groups: dict[str, float]
    downlink_groups: dict[str, float]
    memory: Memory
    personal_state: int
    flops_per_token: float
    overhead: float
    seconds: float
    at_server: float
    note: str = ""
    rounds: tuple[RoundBytes, ...] = ()
    run_up: int = 0
    run_down: int = 0
    run_seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A model's plan.

    Args:
        model: The model.
        clients: Number of clients.
        bandwidth: Mbit/s of a client's link, in each direction.
        methods: One row per method.
        refused: Method -> why it cannot be planned with these settings; only if all methods were requested.
    """

    model: ModelFacts
    clients: int
    bandwidth: float
    methods: tuple[MethodPlan, ...]
    refused: dict[str, str]
