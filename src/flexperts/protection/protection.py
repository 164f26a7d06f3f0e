"""One defence of the shared update: its client's side, its server's side, and what it does not go with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from flexperts.communication.average import weighted_mean
from flexperts.communication.compression import Packed
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.config.section import Section
from flexperts.methods.kit.method import Method
from flexperts.parameters.vector import Vector


class Protection:
    """A defence that a recipe turns on. Each method's default does nothing, so a defence says only what it changes.

    An update here is a change: trained minus sent, flat fp32.

    Args:
        config: The run.
        name: What the recipe's ``[protections.NAME]`` says.
        options: Its settings; the defences that ship have their own sections of the recipe.
    """

    class Options(Section):
        """Settings under ``[protections.NAME]``; none by default."""

    key: ClassVar[str] = ""
    """The setting that turns this on, such as ``privacy.noise``; others' have ``[protections.NAME]`` instead."""
    unset: ClassVar[str] = "none"
    """The value of ``key`` that turns it off."""
    hides: ClassVar[frozenset[str]] = frozenset()
    """Measures of a round that the server is then not told, because they are made from rows."""
    counts_once: ClassVar[bool] = False
    """Whether every client counts once in the average, whatever its rows; so it does under ``combined``."""

    def __init__(self, config: RunConfig, name: str = "", options: Any = None) -> None:
        self.config, self.name = config, name
        self.options = options or self.Options()

    @property
    def setting(self) -> str:
        """What turns this on, as a recipe says it."""
        if not self.key:
            return f"[protections.{self.name}]"
        section, field = self.key.split(".")
        return f"{self.key} = {getattr(getattr(self.config, section), field)!r}"

    @property
    def off(self) -> str:
        """How to turn it off."""
        return f"set {self.key} = {self.unset!r}" if self.key else f"leave out {self.setting}"

    @property
    def fewest(self) -> int:
        """Updates that a round must have for this to protect anything."""
        return 1

    def check(self, method: Method) -> None:
        """Refuse what this does not go with, before the run starts.

        Raises:
            ConfigError: The method, another setting or this installation does not allow it.
        """

    def outgoing(self, change: Vector, memory: dict[str, Tensor]) -> tuple[Vector, Packed | None]:
        """Return a client's update as the server will have it, and its packed form if it travels packed.

        Args:
            change: The update.
            memory: The client's memory, kept from round to round.
        """
        return change, None

    def combined(self, changes: Iterator[Update]) -> Vector:
        """Return one update for the round, on the server. At most one defence of a run may override this.

        Args:
            changes: The clients' updates, each with weight 1, sorted by client.

        Raises:
            FederationError: They are too few.
        """
        return weighted_mean(changes)

    def spent(self, rounds: int) -> dict[str, Any] | None:
        """Return what is guaranteed after some rounds, such as an epsilon; None where nothing is."""
        return None
