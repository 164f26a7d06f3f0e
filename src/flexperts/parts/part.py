"""Parts that a method attaches to the frozen base: modules with separate parameters that work through hooks.

Hooks do not change the base's modules, parameter names or state_dict; detaching a part restores the base bit for
bit. A part's parameters are outside the base, so nothing that saves or sends the base can include them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, Self

import torch
from torch import Generator, nn

from flexperts.errors import GraftError
from flexperts.moe.layout import LayerExperts


class Removable(Protocol):
    """A handle that undoes one change of the base: a torch hook's handle, or a part's own object."""

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
        """Attach the part to the base and yield the handle of each hook; a hook must respect ``enabled``."""

    def attach(self) -> Self:
        """Attach the part: the base computes with it from now on."""
        if self._handles:
            raise GraftError(type(self).__name__, "it is attached already", "detach it first")
        self._handles = list(self.hooks())
        return self

    def detach(self) -> None:
        """Detach the part; the base is then restored bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def beside(self, experts: LayerExperts, module: nn.Module) -> Removable:
        """Add the output of ``module`` to that of a layer's experts while the part is enabled."""
        return experts.add(lambda hidden: module(hidden) if self.enabled else None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the part inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def shared_alone(self) -> AbstractContextManager[None]:
        """Leave inside the block only what is shared of a part with personal parameters; by default nothing."""
        return self.disabled()


def key(name: str) -> str:
    """Return a module name without dots, as ``nn.ModuleDict`` requires."""
    return name.replace(".", "/")


def uniform_matrix(rows: int, fan_in: int, generator: Generator) -> nn.Parameter:
    """Return ``[rows, fan_in]``, drawn uniformly within 1 / sqrt(fan_in), as peft initializes LoRA's A."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter((torch.rand(rows, fan_in, generator=generator) * 2 - 1) * bound)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module with a qualified name."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise GraftError(
            f"module {name!r}", f"{type(model).__name__} has no such module", "name a module of this base"
        ) from error
