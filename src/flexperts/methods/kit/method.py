"""What a federated method is: which parts train, who owns them, how a client trains, how the server combines.

A method is one small class in one file. Its defaults are FedAvg on attention LoRA with everything else personal; a
method overrides only what it does differently. The object holds options and nothing else: a client's state is in
its ``Turn``, the server's in its ``Server``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flexperts.communication.average import weighted_mean
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.config.section import Section
from flexperts.data.batches import PaddedBatch
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Prepared, Site, Turn
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import Manifest, Payload, Vector
from flexperts.parts.part import Part
from flexperts.training.local import TrainResult

State = Literal["zero_shot", "global", "personalized"]
OnBatch = Callable[[PaddedBatch], None]
"""Called with the prompts of every batch that is scored or generated, before it is."""


class Options(Section):
    """A method's own settings, ``[method.options]`` in a recipe; the base has none."""


class Method:
    """Base of all methods."""

    name: ClassVar[str]
    """What recipes call it."""
    summary: ClassVar[str]
    """One line for `flexperts methods`."""
    source: ClassVar[str]
    """Paper, with section where it helps."""
    sends: ClassVar[str] = "attention LoRA"
    """What leaves a client."""
    keeps: ClassVar[str] = "nothing"
    """What a client trains and never sends."""
    Options: ClassVar[type[Options]] = Options
    """The class of the method's settings."""
    needs_experts: ClassVar[bool] = False
    """Whether the base must be a Mixture-of-Experts."""
    has_personal_lora: ClassVar[bool] = False
    """Whether clients have a second adapter of their own."""
    pools_rows: ClassVar[bool] = False
    """Whether one trainer sees all clients' rows."""
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global")
    """Model states that exist and are evaluated."""
    one_global: ClassVar[bool] = True
    """Whether the global model is the same at every client."""
    additive: ClassVar[bool] = True
    """Whether a reply is the broadcast weights after training, all of them, to be averaged by rows: what clipping,
    noise, compression and robust aggregation work on."""
    sends_back: ClassVar[bool] = False
    """Whether what clients get is as large as what came in the rounds before."""
    settles: ClassVar[bool] = False
    """Whether some state needs what ``settle`` makes of the client's train rows."""
    plan_note: ClassVar[str] = ""
    """How a run's costs can differ from those planned before it; empty where they cannot."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    def check(self, config: RunConfig) -> None:
        """Refuse settings that are wrong for this method, by a ConfigError."""

    def check_clients(self, clients: Collection[str]) -> None:
        """Refuse settings that are wrong for these clients, by a ConfigError."""

    def extra_rounds(self, rounds: int) -> int:
        """Return how many rounds of the method's own follow the recipe's."""
        return 0

    # A client's model.

    def prepare(self, site: Site) -> Prepared:
        """Decide what is decided once, before any training."""
        return Prepared()

    def reports_prepared(self, config: RunConfig) -> bool:
        """Tell whether ``report`` looks at what ``prepare`` decided; else clients prepare in their first round."""
        return False

    def report(self, site: Site) -> Any:
        """Return what the server is told when the client joins, as plain JSON values; by default nothing."""
        return None

    def parts(self, site: Site) -> dict[str, Part]:
        """Build what is hung onto the base, by name; a part's parameters are called ``<name>.<its own name>``."""
        return {}

    def initial_site(self, site: Site) -> Site:
        """Return the site whose parts hold every shared tensor of the run; the first client sends them for round 1.

        By default the client's own; a method whose clients hold different parts returns one that holds all.
        """
        return site

    def initial(self, split: ParameterSplit) -> Mapping[str, Tensor]:
        """Return what the first client tells the server before round 1: shared parameters, ``derived.`` values."""
        return split.shared

    def shared(self, names: Collection[str]) -> set[str]:
        """Return which trained parameters are shared; the others are personal. By default, LoRA is shared."""
        return {name for name in names if name.startswith(SHARED_PREFIX)}

    def trains(self, name: str) -> bool:
        """Tell whether a parameter of adapters or parts trains at all."""
        return True

    # A client's round.

    def receive(self, turn: Turn) -> None:
        """Put what the server sent into the model."""
        turn.load(turn.received)

    def train(self, turn: Turn) -> TrainResult:
        """Do one client's local work of one round, in place on the split's trained parameters."""
        return turn.fit()

    def personalize(self, turn: Turn) -> TrainResult:
        """Train the personal part alone, the shared one standing still, as who joins a finished run does."""
        return turn.fit(shared=False)

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return what is sent after training: shared parameters, and what training has derived."""
        return {**turn.split.shared, **turn.derived}

    def settle(self, turn: Turn) -> dict[str, Tensor]:
        """Return what ``in_state`` needs of the client's train rows, for this very model.

        It is kept beside the personal state and comes back as ``turn.settled``, so that a model can be used where
        its rows are not. What ``in_state`` does not find there, it makes of ``turn.site.examples``.
        """
        return {}

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Let the model compute in a state inside the block; what is yielded is called before every batch.

        By default the global state leaves out every part that holds something personal.
        """
        with ExitStack() as stack:
            if state == "zero_shot":
                stack.enter_context(turn.site.lora.use())
            for name, part in turn.parts.items():
                personal = any(p.startswith(f"{name}.") for p in turn.split.personal)
                if state == "zero_shot" or (state == "global" and personal):
                    stack.enter_context(part.disabled())
            yield None

    # The server.

    def agree(self, reports: Mapping[str, Any]) -> Any:
        """Return what all clients are told after they have joined, as plain JSON values."""
        return None

    def start(self, server: Server) -> None:
        """Set up the server's memory before round 1."""

    def regroup(self, server: Server) -> None:
        """Fit the server's memory to ``server.clients``, of whom some have come or gone between two rounds."""

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Return who trains in the coming round; by default the clients that were sampled."""
        return sampled

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return what a client is sent before it trains."""
        return server.shared

    def final(self, server: Server, client: str) -> Payload:
        """Return what a client needs to compute with the finished global model."""
        return self.broadcast(server, client)

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare what a client's reply holds; anything else is refused."""
        return server.shared.manifest

    def check_update(self, server: Server, update: Update) -> None:
        """Refuse an update, by a FederationError, whose values are none that the method can send."""

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Combine the round's updates, sorted by client, into the server's state."""
        mean = weighted_mean(updates)
        server.shared = replace(server.shared, vector=self.step(server, mean))

    def step(self, server: Server, mean: Vector) -> Vector:
        """Return the next shared weights from the clients' weighted mean; by default the mean itself."""
        return mean

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return the shared adapter's tensors under the names that PEFT uses; empty where there is none."""
        return {n: t for n, t in server.shared.tensors().items() if n.startswith(SHARED_PREFIX)}


def named_parameters(parts: Mapping[str, Part]) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of all parts under the names that splits use."""
    return {f"{name}.{n}": p for name, part in parts.items() for n, p in part.named_parameters()}
