"""A method's view of a client: the site from which parts are built, and one turn of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Generator, Tensor, nn
from torch.nn import Parameter

from flexperts.config.run import RunConfig
from flexperts.data.prompts import Example
from flexperts.modeling.lora import LoraAdapters
from flexperts.moe.layout import LayerExperts
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import copy_tensors
from flexperts.parts.part import Part
from flexperts.seeding import generator
from flexperts.selection.selection import CalibrationSettings, LayerScores, score_experts
from flexperts.training.local import LocalSettings, Objective, StepHooks, TrainResult, response_loss, train_local


@dataclass(frozen=True)
class Prepared:
    """A client's decisions before any training, made once from the untouched base and its own rows.

    Args:
        choice: Chosen experts by experts module.
        selection: Relative reconstruction loss of every expert, by experts module.
        scales: Factor on each chosen expert's output, by experts module; empty means 1.
    """

    choice: dict[str, tuple[int, ...]] = field(default_factory=dict)
    selection: dict[str, list[float]] = field(default_factory=dict)
    scales: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One client's place on the resident base: everything that a method needs to build its parts.

    Args:
        client: The client's name.
        config: The run.
        lora: The adapters in the base.
        experts: The base's experts modules; empty for a method that does not need experts.
        examples: The client's encoded train rows.
        pad_token_id: Token that pads short rows.
        prepared: The client's decisions before any training.
        agreement: The value of ``Method.agree`` for all clients' reports; None before there is one.
        on_batch: Called for each batch of the selection: how many are done, of how many.
    """

    client: str
    config: RunConfig
    lora: LoraAdapters
    experts: Sequence[LayerExperts]
    examples: Sequence[Example]
    pad_token_id: int
    prepared: Prepared = Prepared()
    agreement: Any = None
    on_batch: Callable[[int, int], None] = lambda done, total: None

    def generator(self, *purpose: str | int) -> Generator:
        """Return a random stream for this client."""
        return generator(self.config.seed, self.client, *purpose)

    def common_generator(self, *purpose: str | int) -> Generator:
        """Return a random stream that is the same on all clients."""
        return generator(self.config.seed, *purpose)

    def score_experts(self) -> list[LayerScores]:
        """Score every expert of every layer on the client's own rows, with the untouched base."""
        settings = CalibrationSettings(
            graft=self.config.graft,
            batch_size=self.config.training.rows_per_pass,
            pad_token_id=self.pad_token_id,
            precision=self.config.model.precision,
        )
        stream = self.generator("calibration")
        with self.lora.use():
            return score_experts(self.lora.base, self.experts, self.examples, settings, stream, self.on_batch)


@dataclass
class Turn:
    """One client's turn on the model: everything that its part of a round needs.

    Args:
        site: The client's place on the base.
        round: The round, from 1; rounds above ``site.config.federation.rounds`` are the method's extra ones.
        split: The owner of each parameter: shared, personal, frozen.
        parts: The method's parts, attached.
        received: The tensors that the server sent, by name.
        memory: Tensors that the method keeps on this client between rounds; changed in place.
        settings: The round's local settings.
        stream: Random stream of the round's batches.
        on_step: Called with every step's loss and tokens.
        objective: The loss; language modelling on responses, or the run's other objective.
        moments: AdamW's moments of the personal parameters by ``<moment>.<parameter>``, kept on this client between
            rounds; None if every round starts without any.
        derived: Tensors computed in training and sent with the shared parameters; names start with ``derived.``.
        settled: The value of ``Method.settle`` for this model and the client's rows; empty if there is none.
    """

    site: Site
    round: int
    split: ParameterSplit
    parts: Mapping[str, Part]
    received: dict[str, Tensor]
    memory: dict[str, Tensor]
    settings: LocalSettings
    stream: Generator
    on_step: Callable[[float, int], None] = lambda loss, tokens: None
    objective: Objective = response_loss
    moments: dict[str, Tensor] | None = None
    derived: dict[str, Tensor] = field(default_factory=dict)
    settled: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model with adapters and parts."""
        model: nn.Module = self.site.lora.model
        return model

    def fit(
        self,
        *,
        shared: bool = True,
        personal: bool = True,
        settings: LocalSettings | None = None,
        hooks: StepHooks | None = None,
        objective: Objective | None = None,
        trains: Callable[[str], bool] = lambda name: True,
        examples: Sequence[Example] | None = None,
    ) -> TrainResult:
        """Train the given groups on the client's rows; the other group is frozen.

        Args:
            shared, personal: Whether the group trains; an empty group does not.
            settings: Local settings; None takes the round's.
            hooks: The method's additions to every step.
            objective: The loss; None takes the turn's.
            trains: Which parameters of the groups train, by name.
            examples: The rows; None takes all train rows.
        """
        groups = replace(
            self.split,
            shared={n: p for n, p in self.split.shared.items() if shared and trains(n)},
            personal={n: p for n, p in self.split.personal.items() if personal and trains(n)},
        )
        settings, objective = settings or self.settings, objective or self.objective
        with _only(self.split.trained, groups.trained):
            return train_local(
                self.model,
                groups,
                self.site.examples if examples is None else examples,
                settings,
                self.stream,
                self.on_step,
                hooks=hooks,
                objective=objective,
                moments=self.moments,
            )

    def load(self, tensors: Mapping[str, Tensor], into: Mapping[str, Parameter] | None = None) -> None:
        """Copy named tensors into parameters of the same names and shapes, by default into the shared group."""
        copy_tensors(tensors, self.split.shared if into is None else into)


@contextmanager
def _only(everything: Mapping[str, Parameter], training: Mapping[str, Parameter]) -> Iterator[None]:
    """Compute gradients for only some parameters inside the block."""
    with ExitStack() as stack:
        for name, parameter in everything.items():
            if name not in training and parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        yield
