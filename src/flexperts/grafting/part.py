"""What a method hangs onto the frozen base: a module of its own parameters that works through hooks.

Hooks leave the base's modules, parameter names and state_dict as they are; taking a part off restores the base bit for
bit. A part's parameters live outside the base, so nothing that saves or sends the base can carry them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from flexperts.errors import GraftError


class Part(nn.Module, ABC):
    """Base of all parts."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def hooks(self) -> Iterator[RemovableHandle]:
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
