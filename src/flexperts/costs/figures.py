"""A plan's figures. Bytes are those of payloads; a message's wrapping adds a few kilobytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexperts.costs.rounds import RoundBytes


@dataclass(frozen=True)
class ModelFacts:
    """A model in numbers.

    Args:
        name, note: As in its description.
        parameters: All of them.
        active_parameters: Without the routed experts that a token does not meet; embeddings included.
        weights: Bytes of the frozen weights in the recipe's type.
        moe_layers, experts, experts_per_token: Layers with routed experts; N and K of each.
        flops_per_token: Of a forward pass, see ``flops``.
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
    """What a client holds while it trains, in bytes; activations are left out, as they depend on rows and kernels.

    Args:
        weights: Frozen base.
        added: fp32 values of adapters and parts, trained or not.
        gradients: fp32, of what trains.
        moments: The optimizer's two fp32 moments of what trains; 0 for SGD.
    """

    weights: int
    added: int
    gradients: int
    moments: int
    total: int = field(init=False)
    """All of it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.weights + self.added + self.gradients + self.moments)


@dataclass(frozen=True)
class MethodPlan:
    """What a method costs one client; bytes are means over rounds and their participants.

    Args:
        name, method: The row's name; the method's, empty for what is none.
        shared, personal: Parameters trained.
        uplink, downlink: Payload bytes per client and round.
        uplink_groups, downlink_groups: The same by tensor group, before packing.
        memory: While it trains.
        personal_state: Bytes on disk of its personal parameters, one generation of the two that are kept.
        flops_per_token: Of a forward pass with all that the method adds.
        overhead: Share of that beyond the base's.
        seconds: To send both payloads of a round over the client's own link.
        at_server: Payload bytes of a round, all participants, both directions; a mean over rounds.
        note: How a run can differ; empty where it cannot.
        rounds: The payloads, round by round.
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


@dataclass(frozen=True)
class Plan:
    """A model's plan.

    Args:
        model: The model.
        clients: How many.
        bandwidth: Mbit/s of a client's link, in either direction.
        methods: One row each.
        refused: Method -> why it cannot be planned with these settings, where all were asked for.
    """

    model: ModelFacts
    clients: int
    bandwidth: float
    methods: tuple[MethodPlan, ...]
    refused: dict[str, str]
