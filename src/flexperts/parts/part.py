"""What a method hangs onto the frozen base: a module of its own parameters that works through hooks.

Hooks leave the base's modules, parameter names and state_dict as they are; taking a part off restores the base bit
for bit. A part's parameters live outside the base, so nothing that saves or sends the base can carry them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, Self

import torch
from torch import Generator, nn

from flexperts.errors import GraftError
from flexperts.moe.layout import LayerExperts


class Removable(Protocol):
    """What takes one change of the base back: a torch hook's handle, or an object of a part's own."""

    def remove(self) -> None:
        """Undo the change."""


class Part(nn.Module, ABC):
    """Base of all parts."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._handles: list[Removable] = []

    @abstractmethod
    def hooks(self) -> Iterator[Removable]:
        """Hang the part onto the base and yield the handle of each hook; a hook heeds ``enabled``."""

    def attach(self) -> Self:
        """Let the base compute with this part from now on.

        Raises:
            GraftError: It is attached already.
        """
        if self._handles:
            raise GraftError(type(self).__name__, "it is attached already", "detach it first")
        self._handles = list(self.hooks())
        return self

    def detach(self) -> None:
        """Take the part off; the base is then what it was, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def beside(self, experts: LayerExperts, module: nn.Module) -> Removable:
        """Hang ``module`` beside a layer's experts: while the part is enabled, its output is added to theirs."""
        return experts.add(lambda hidden: module(hidden) if self.enabled else None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute without the part inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


def key(name: str) -> str:
    """Return a module name in the form that ``nn.ModuleDict`` takes: without dots."""
    return name.replace(".", "/")


def uniform_matrix(rows: int, fan_in: int, generator: Generator) -> nn.Parameter:
    """Return ``[rows, fan_in]``, uniform within 1 / sqrt(fan_in) as peft starts LoRA's A, from its own stream."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter((torch.rand(rows, fan_in, generator=generator) * 2 - 1) * bound)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that qualified name.

    Raises:
        GraftError: The model has none of that name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise GraftError(
            f"module {name!r}", f"{type(model).__name__} has none of that name", "name a module of this base"
        ) from error
