"""The split of parameters: each is exactly one of shared, personal, frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor
from torch.nn import Parameter

from flexperts.errors import SplitError
from flexperts.parameters.fingerprint import inner_tensors, stored_bytes

Parameters = Mapping[str, Parameter]


@dataclass(frozen=True)
class ParameterSplit:
    """Three disjoint, covering groups of named parameters.

    Args:
        shared: Trained, sent to the server and averaged.
        personal: Trained, and always kept on the client.
        frozen: Not trained and not sent: the same on every client.
    """

    shared: Parameters
    personal: Parameters
    frozen: Parameters

    @property
    def trained(self) -> dict[str, Parameter]:
        """Shared and personal parameters, by name."""
        return {**self.shared, **self.personal}

    def describe(self) -> list[dict[str, str | int]]:
        """Return one row per group for the table shown before round 1: parameters, bytes, and where they go."""
        return [
            _row("shared", self.shared, "yes", "to the server, every round"),
            _row("personal", self.personal, "yes", "never leaves the client"),
            _row("frozen", self.frozen, "no", "never leaves the client"),
        ]


def split_parameters(parameters: Parameters, shared: Iterable[str], personal: Iterable[str]) -> ParameterSplit:
    """Divide named parameters by claims; parameters without a claim are frozen.

    Args:
        parameters: Every parameter of the model and of its grafts, by unique name.
        shared: Names claimed as shared.
        personal: Names claimed as personal.

    Raises:
        SplitError: A claim names an unknown parameter, two claims overlap (by name or by storage), a claimed
            parameter is not trainable, or an unclaimed one is.
    """
    claims = {"shared": set(shared), "personal": set(personal)}
    claimed = claims["shared"] | claims["personal"]
    _refuse(claims["shared"] & claims["personal"], "claimed as shared and as personal")
    _refuse(claimed - parameters.keys(), "claimed but not in the model")
    _refuse(
        (n for n in claimed & parameters.keys() if not parameters[n].requires_grad),
        "claimed but not trainable",
    )
    _refuse(
        (n for n, p in parameters.items() if p.requires_grad and n not in claimed),
        "trainable but not claimed",
    )
    groups = (claims["shared"], claims["personal"], parameters.keys() - claimed)
    split = ParameterSplit(*(MappingProxyType({n: p for n, p in parameters.items() if n in g}) for g in groups))
    _refuse(aliases(split), "shared, but its storage belongs to a personal or frozen parameter")
    return split


def aliases(split: ParameterSplit) -> list[str]:
    """Return the names of shared parameters whose memory also belongs to another group."""
    kept = kept_storages(split)
    return [name for name, p in split.shared.items() if storage_address(p) in kept]


def kept_storages(split: ParameterSplit) -> set[int]:
    """Return the addresses of all memory that belongs to personal and frozen parameters."""
    # Empty tensors have no memory to share: their address is 0.
    groups = (split.personal, split.frozen)
    return {storage_address(t) for group in groups for p in group.values() for t in inner_tensors(p)} - {0}


def storage_address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, the same for all views of it."""
    return tensor.untyped_storage().data_ptr()


def _refuse(names: Iterable[str], why: str) -> None:
    if found := sorted(names):
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise SplitError(
            shown,
            f"{why}; every parameter is exactly one of shared, personal, frozen",
            "make the method claim each trainable parameter once, and freeze all others",
        )


def _row(group: str, parameters: Parameters, trained: str, leaves: str) -> dict[str, str | int]:
    return {
        "group": group,
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters.values()),
        "bytes": sum(map(stored_bytes, parameters.values())),
        "trained": trained,
        "leaves": leaves,
    }
