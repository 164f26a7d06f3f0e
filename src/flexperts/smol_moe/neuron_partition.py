"""The partition asset: the assignment of neurons to experts, layer by layer, and the routers.

It is a safetensors file with three tensors and one JSON metadata entry; `calibrate` computes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexperts.errors import ModelError

if TYPE_CHECKING:
    import torch

META_KEY = "flexperts.partition"
TENSORS = ("shared", "routed", "routers")


@dataclass(frozen=True)
class NeuronPartition:
    """The split of dense FFN layers into a shared part and routed experts.

    Attributes:
        layers: The indices of the split layers, ascending [L].
        top_k: Number of routed experts that are active for a token.
        shared: Neuron ids of the shared part, int16 [L, S].
        routed: Neuron ids of each expert, int16 [L, E, W].
        routers: Router weights before `router_scale`, float16 [L, E, hidden].
        router_scale: Factor of the routers; small, so that the chosen experts have about the same weight.
        metadata: How the partition was made (command, seed, sha256 of texts and weights, sizes); JSON values.
    """

    layers: tuple[int, ...]
    top_k: int
    shared: torch.Tensor
    routed: torch.Tensor
    routers: torch.Tensor
    router_scale: float = 1.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """Number of routed experts of a layer (E)."""
        return int(self.routed.shape[1])

    @property
    def expert_size(self) -> int:
        """Number of neurons of a routed expert (W)."""
        return int(self.routed.shape[2])

    @property
    def shared_size(self) -> int:
        """Number of neurons of the shared part (S)."""
        return int(self.shared.shape[1])

    def check(self) -> None:
        """Refuse a partition unless every layer has every neuron exactly once and the shapes agree."""
        import torch

        depth = len(self.layers)
        every = torch.cat([self.shared, self.routed.flatten(1)], dim=1).long().sort(dim=1).values
        fits = every.shape[0] == depth == len(self.routers) and self.routers.shape[1] == self.experts
        if fits and torch.equal(every, torch.arange(every.shape[1]).expand(depth, -1)):
            return
        raise ModelError(
            f"partition of layers {list(self.layers)}",
            "must contain every neuron of a layer exactly once",
            "compute it again with: flexperts base partition",
        )


def save_neuron_partition(partition: NeuronPartition, path: Path) -> None:
    """Write a partition as a safetensors file."""
    from safetensors.torch import save_file

    about = {
        "layers": list(partition.layers),
        "top_k": partition.top_k,
        "router_scale": partition.router_scale,
        **partition.metadata,
    }
    tensors = {name: getattr(partition, name).contiguous() for name in TENSORS}
    save_file(tensors, path, metadata={META_KEY: json.dumps(about, sort_keys=True)})
    path.chmod(0o644)  # safetensors writes 0600


def load_neuron_partition(path: Path) -> NeuronPartition:
    """Read and check a partition file.

    Args:
        path: A file that `save_neuron_partition` wrote.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[META_KEY])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"partition file {path}", f"cannot be read ({error})", "install flexperts again"
        ) from error
    layers, top_k, scale = tuple(about.pop("layers")), about.pop("top_k"), about.pop("router_scale")
    partition = NeuronPartition(layers, top_k, router_scale=scale, metadata=about, **tensors)
    partition.check()
    return partition
