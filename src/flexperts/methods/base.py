"""What a federated method is: which parts train, who owns them, how a client trains, how the server combines.

A method is one small class in one file. Its defaults are FLEx's frame: LoRA on attention and everything trained
together. A method overrides only what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

from torch import Generator, nn

from flexperts.communication.average import weighted_mean
from flexperts.communication.messages import Update
from flexperts.data.prompts import Example
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import Vector
from flexperts.training.local import LocalSettings, TrainResult, train_local

State = Literal["zero_shot", "global", "personalized"]
GRAFT_PREFIX = "graft."
"""Start of the names of a graft's parameters; LoRA's names start otherwise."""


class Method:
    """Base of all methods."""

    name: ClassVar[str]
    """What recipes call it."""
    summary: ClassVar[str]
    """One line for `flexperts methods`."""
    source: ClassVar[str]
    """Paper, with section where it helps."""
    grafts: ClassVar[bool] = False
    """Whether each client grows personal experts."""
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global")
    """Model states that exist and are evaluated."""

    def is_shared(self, name: str) -> bool:
        """Tell whether the trainable parameter ``name`` is sent and averaged; what is not stays personal."""
        return not name.startswith(GRAFT_PREFIX)

    def train(
        self,
        model: nn.Module,
        split: ParameterSplit,
        examples: Sequence[Example],
        settings: LocalSettings,
        generator: Generator,
        on_step: Callable[[float], None],
    ) -> TrainResult:
        """Do one client's local work of one round, in place on the split's trained parameters."""
        return train_local(model, split, examples, settings, generator, on_step)

    def aggregate(self, current: Vector, updates: Iterable[Update]) -> Vector:
        """Return the next shared weights from the current ones and the round's updates, sorted by client."""
        return weighted_mean(updates)
