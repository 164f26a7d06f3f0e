"""The base class of federated methods: which parts train, who owns them, how clients train, what the server does.

A method is one small class in one file. Its defaults are FedAvg on attention LoRA with everything else personal; a
method overrides only what it does differently. The object holds options and nothing else: a client's state is in
its ``Turn``, the server's in its ``Server``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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

State = Literal["zero_shot", "global", "personalized", "chosen"]
"""A model's state. chosen is the one that a client keeps where a run has a ``[floor]``; no method sets it up."""
OnBatch = Callable[[PaddedBatch], None]
"""Called with the prompts of every batch before it is scored or answered."""


class Method:
    """Base of all methods."""

    class Options(Section):
        """A method's settings, ``[method.options]`` in a recipe; none by default."""

    name: ClassVar[str]
    """Its name in recipes."""
    summary: ClassVar[str]
    """One line for `flexperts methods`."""
    source: ClassVar[str]
    """The paper, with a section if that helps."""
    sends: ClassVar[str] = "attention LoRA"
    """The values that leave a client, in words."""
    keeps: ClassVar[str] = "nothing"
    """The values that a client trains and never sends, in words."""
    needs_experts: ClassVar[bool] = False
    """Whether the base must be a Mixture-of-Experts."""
    has_personal_lora: ClassVar[bool] = False
    """Whether each client has a second, personal adapter."""
    pools_rows: ClassVar[bool] = False
    """Whether one trainer trains on all clients' rows."""
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global")
    """Model states that exist and are evaluated."""
    one_global: ClassVar[bool] = True
    """Whether all clients have the same global model."""
    additive: bool = True
    """Whether a reply that is not empty holds all broadcast weights after training, for averaging by rows;
    ``derived.`` values of a broadcast do not come back. Clipping, noise, compression and robust aggregation need
    such replies. Options may decide it."""
    sends_back: ClassVar[bool] = False
    """Whether a broadcast's tensors depend on the replies of earlier rounds; a plan then combines replies that have
    only sizes."""
    settles: ClassVar[bool] = False
    """Whether a state needs the values that ``settle`` computes from the client's train rows."""
    opens_to: ClassVar[Literal["expert", "difference"]] = "expert"
    """What the gates of its grafts open to where the recipe has ``graft.output = "auto"``."""
    moments: ClassVar[Literal["fresh", "kept"]] = "fresh"
    """What becomes of AdamW's personal moments where the recipe has ``training.personal_moments = "auto"``."""
    personal_once: ClassVar[bool] = False
    """Whether a client trains its personal parameters in one round alone, so that kept moments have no effect."""
    alone: ClassVar[str] = "local_lora"
    """The method with which a client trains the same parts on its own rows alone, for the run's ``[floor]``."""
    report_type: ClassVar[Any] = None
    """Type of what ``report`` returns, for pydantic. A report comes from another machine: the server takes nothing
    else, without conversions, and no number that is not finite."""
    plan_note: ClassVar[str] = ""
    """How a run's costs can differ from the planned ones; empty if they cannot."""
    budget_note: ClassVar[str] = ""
    """What a reader of its scores must know: steps and searched rows relative to FedAvg, and in what it differs
    from its paper or from the code of other studies. It is below every table with its rows, and options in braces
    have the run's values there; empty adds nothing."""

    def __init__(self, options: Method.Options | None = None) -> None:
        self.options = options or self.Options()

    def budget(self) -> str:
        """Return ``budget_note`` with the values of its options."""
        return self.budget_note.format(**self.options.model_dump())

    def check(self, config: RunConfig) -> None:
        """Raise a ConfigError for settings that are wrong for this method."""

    def check_clients(self, clients: Collection[str]) -> None:
        """Raise a ConfigError for settings that are wrong for these clients."""

    def named_clients(self) -> Collection[str]:
        """Return the clients that the options name; a recipe with rows must have them, in the run or left out."""
        return ()

    def extra_rounds(self, rounds: int) -> int:
        """Return how many extra rounds of the method follow the recipe's rounds."""
        return 0

    def total_rounds(self, rounds: int) -> int:
        """Return how many rounds a run has: the recipe's and the method's extra ones."""
        return rounds + self.extra_rounds(rounds)

    @property
    def full_rounds(self) -> int:
        """How many of the first rounds all clients take part in, even if only a share is sampled in the others."""
        return 0

    def turns(self, config: RunConfig) -> int:
        """Return the rounds of steps that a client takes, on average: rounds x participation, and extra rounds."""
        return config.federation.turns(self.full_rounds) + self.extra_rounds(config.federation.rounds)

    # A client's model.

    def prepare(self, site: Site) -> Prepared:
        """Return what a client decides once, before any training."""
        return Prepared()

    def reports_prepared(self, config: RunConfig) -> bool:
        """Return whether ``report`` needs the result of ``prepare``; else clients prepare in their first round."""
        return False

    def report(self, site: Site) -> Any:
        """Return the client's report to the server on joining, as plain JSON values; by default None."""
        return None

    def parts(self, site: Site) -> dict[str, Part]:
        """Build the parts to attach to the base, by name; a part's parameters are called ``<part>.<parameter>``."""
        return {}

    def initial_site(self, site: Site) -> Site:
        """Return a site whose parts hold every shared tensor of the run; the first client sends them for round 1.

        By default this is the client's site. A method whose clients hold different parts returns a site with all.
        """
        return site

    def initial(self, split: ParameterSplit) -> Mapping[str, Tensor]:
        """Return what the first client sends before round 1: shared parameters, ``derived.`` values."""
        return split.shared

    def shared(self, names: Collection[str]) -> set[str]:
        """Return the names of the shared parameters among the trained ones; by default those of LoRA."""
        return {name for name in names if name.startswith(SHARED_PREFIX)}

    def trains(self, name: str) -> bool:
        """Return whether a parameter of the adapters or parts trains."""
        return True

    # A client's round.

    def receive(self, turn: Turn) -> None:
        """Load the tensors that the server sent into the model."""
        turn.load(turn.received)

    def train(self, turn: Turn) -> TrainResult:
        """Train one client for one round, in place on the split's trained parameters."""
        return turn.fit()

    def personalize(self, turn: Turn) -> TrainResult:
        """Train the personal part alone with the shared one frozen; used when a client joins a finished run."""
        return turn.fit(shared=False)

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return what is sent after training: shared parameters, and ``derived.`` values from training."""
        return {**turn.split.shared, **turn.derived}

    def settle(self, turn: Turn) -> dict[str, Tensor]:
        """Return the tensors that ``in_state`` needs from the client's train rows, for the current model.

        They are saved next to the personal state and returned as ``turn.settled``, so that the model can be used
        without its rows. If they are missing there, ``in_state`` computes them from ``turn.site.examples``.
        """
        return {}

    @contextmanager
    def in_state(self, turn: Turn, state: State) -> Iterator[OnBatch | None]:
        """Put the model into a state inside the block; yield a function to call before every batch, or None.

        By default the global state has what is shared alone of every part that has personal parameters.
        """
        with ExitStack() as stack:
            if state == "zero_shot":
                stack.enter_context(turn.site.lora.use())
            for name, part in turn.parts.items():
                personal = any(p.startswith(f"{name}.") for p in turn.split.personal)
                if state == "zero_shot":
                    stack.enter_context(part.disabled())
                elif state == "global" and personal:
                    stack.enter_context(part.shared_alone())
            yield None

    def mixes(self, config: RunConfig) -> bool:
        """Return whether the method has models between global and personalized; by default, if it has ``mixed``."""
        return type(self).mixed is not Method.mixed

    def mixed(self, turn: Turn, weight: float) -> AbstractContextManager[OnBatch | None]:
        """Return a context in which the model lies between global and personalized, such as ``in_state``.

        Every output that personal parameters add or replace gets the share ``weight``, and the global one the rest.
        The turn is not used for anything else afterwards. It is called if the method ``mixes``.

        Args:
            turn: The client's turn with the finished model.
            weight: Above 0 (global) and below 1 (personalized).
        """
        raise NotImplementedError

    # The server.

    def agree(self, reports: Mapping[str, Any]) -> Any:
        """Return the agreement that all clients receive after joining, as plain JSON values."""
        return None

    def check_report(self, server: Server, client: str) -> None:
        """Raise a FederationError for a client's report that does not fit the shared weights."""

    def start(self, server: Server) -> None:
        """Set up the server's memory before round 1."""

    def regroup(self, server: Server) -> None:
        """Adapt the server's memory to ``server.clients`` after clients have joined or left between two rounds."""

    def participants(self, server: Server, sampled: Sequence[str]) -> Sequence[str]:
        """Return the clients that train in round ``server.round + 1``; by default all or the sampled clients.

        With secure aggregation this is asked while the round before ends: ``round`` alone is then as after it.
        """
        return sorted(server.clients) if server.round < self.full_rounds else sampled

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the payload sent to a client before it trains."""
        return server.shared

    def final(self, server: Server, client: str) -> Payload:
        """Return the payload with which a client uses the finished global model."""
        return self.broadcast(server, client)

    def sends_weights(self, server: Server) -> bool:
        """Return whether the replies of the coming round hold any values; if not, ``uplink`` declares none."""
        return True

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare the names and shapes in a client's reply; anything else is refused."""
        return server.shared.manifest

    def check_update(self, server: Server, update: Update) -> None:
        """Raise a FederationError for an update with values that the method cannot send."""

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Combine the round's updates, sorted by client, into the server's state."""
        mean = weighted_mean(updates)
        server.shared = replace(server.shared, vector=self.step(server, mean))

    def step(self, server: Server, mean: Vector) -> Vector:
        """Return the next shared weights from the clients' weighted mean; by default the mean itself."""
        return mean

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return the shared adapter's tensors under PEFT's names; empty if there is none."""
        return {n: t for n, t in server.shared.tensors().items() if n.startswith(SHARED_PREFIX)}


def named_parameters(parts: Mapping[str, Part]) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of all parts under their names in splits."""
    return {f"{name}.{n}": p for name, part in parts.items() for n, p in part.named_parameters()}
