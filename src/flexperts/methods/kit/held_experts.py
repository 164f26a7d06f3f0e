"""Methods whose clients adapt experts and routers and send them: their base class, and tensors by holder.

These parts are named ``experts`` and ``router``; a layer's name is the one in the parameter names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from flexperts.methods.kit.method import Method, OnBatch, State
from flexperts.methods.kit.turn import Turn

EXPERTS, ROUTER = "experts.layers.", "router.layers."
"""Prefixes of names: an expert's tensor is ``<prefix><layer>.<expert>.<tensor>``, a router ``<prefix><layer>``."""
Held = Mapping[str, Sequence[int]]
"""Layer -> the experts that a client holds there, in the order of its router rows."""


def place_of(name: str) -> tuple[str, int]:
    """Return the layer and the number of a tensor's expert."""
    layer, expert, _ = name.removeprefix(EXPERTS).split(".")
    return layer, int(expert)


def held_part(tensors: Mapping[str, Tensor], held: Held) -> dict[str, Tensor]:
    """Return the shared tensors that a holder of these experts has; a router is reduced to their rows."""
    part = {}
    for name, tensor in tensors.items():
        if name.startswith(EXPERTS):
            layer, expert = place_of(name)
            if expert in held[layer]:
                part[name] = tensor
        elif name.startswith(ROUTER):
            part[name] = tensor[list(held[name.removeprefix(ROUTER)])]
        else:
            part[name] = tensor
    return part


def split_routers(tensors: Mapping[str, Tensor], held: Held) -> dict[str, Tensor]:
    """Return the tensors with every router split into rows, ``<name>.<expert>``, so that each row has holders."""
    rows = {
        f"{name}.{expert}": row
        for name, tensor in tensors.items()
        if name.startswith(ROUTER)
        for expert, row in zip(held[name.removeprefix(ROUTER)], tensor, strict=True)
    }
    return {n: t for n, t in tensors.items() if not n.startswith(ROUTER)} | rows


def joined_routers(by_row: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the rows of ``split_routers`` again, for tensors of all experts; names are those of ``like``."""
    return {
        n: torch.stack([by_row[f"{n}.{e}"] for e in range(len(t))]) if n.startswith(ROUTER) else by_row[n]
        for n, t in like.items()
    }


class OwnParts(Method):
    """Base of methods that send all that trains, and whose global state is attention LoRA on the untouched base."""

    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")
    additive = False

    def shared(self, names: Collection[str]) -> set[str]:
        """Return all trained parameters: everything is sent."""
        return set(names)

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Disable the parts outside the personalized state: they are what a client has besides the global LoRA."""
        with ExitStack() as stack:
            if state == "zero_shot":
                stack.enter_context(turn.site.lora.use())
            for part in turn.parts.values() if state != "personalized" else ():
                stack.enter_context(part.disabled())
            yield None
