"""One defence of the shared update: the client's side, the server's side, and what it is not compatible with."""

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
    """A defence that a recipe turns on. The methods do nothing by default; a defence overrides those it needs.

    An update here is a change: trained minus sent, flat fp32.

    Args:
        config: The run.
        name: NAME of the recipe's ``[protections.NAME]``.
        options: Its settings; shipped defences have separate sections in the recipe.
    """

    class Options(Section):
        """Settings under ``[protections.NAME]``; none by default."""

    key: ClassVar[str] = ""
    """The setting that turns this on, such as ``privacy.noise``; empty for those of other packages."""
    unset: ClassVar[str] = "none"
    """The value of ``key`` that turns it off."""
    hides: ClassVar[frozenset[str]] = frozenset()
    """Measures of a round that are then not sent to the server, because they are computed from rows."""
    counts_once: ClassVar[bool] = False
    """Whether every client has weight 1 in the average, with any number of rows, as in ``combined``."""

    draws: ClassVar[bool] = False
    """Whether ``combined`` draws noise: a round's result is then made once, also if the server is stopped."""

    def __init__(self, config: RunConfig, name: str = "", options: Any = None) -> None:
        self.config, self.name = config, name
        self.options = options or self.Options()

    @property
    def setting(self) -> str:
        """The setting that turns this on, as a recipe has it."""
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
        """Refuse settings that are not compatible with this defence, before the run starts.

        Raises:
            ConfigError: The method, another setting or this installation does not allow it.
        """

    def outgoing(self, change: Vector, memory: dict[str, Tensor]) -> tuple[Vector, Packed | None]:
        """Return a client's update as the server will have it, and its packed form if it is sent packed.

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
            FederationError: There are too few updates.
        """
        return weighted_mean(changes)

    def spent(self, rounds: int) -> dict[str, Any] | None:
        """Return what is guaranteed after some rounds, such as an epsilon; None if nothing is."""
        return None
