"""Local training only, with FLEx's trainable parts or with LoRA alone; nothing is sent."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.flex import Grafted, graft_dropout
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.turn import Turn
from flexperts.training.local import StepHooks, TrainResult


class Local(Grafted):
    """Each client trains alone, with a personal LoRA and graft.

    Source: the local bound of arXiv 2506.00965's comparison.
    Client i minimises its own f_i over FLEx's parameters in all rounds; nothing couples the clients.
    Trained: attention LoRA, personal experts, gate. Sent: nothing. Aggregated: nothing. Stays: all of it.
    Inference: the client's own LoRA, experts and gate.
    Open choices: those of flex about the graft. The LoRA is personal, so its rate is ``training.personal_lr`` if
    that is set. flex's options are about a shared part and do not exist here; ``graft.sharing`` must be "personal".
    Every round has a new AdamW, as FLEx in its paper, unless ``training.personal_moments = "kept"``.
    """

    name = "local"
    source = "arXiv 2506.00965"
    summary = "LoRA and graft trained on the client's own rows; nothing is sent"
    sends = "nothing"
    keeps = "attention LoRA, grafted experts and their gate"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")
    additive = False

    def check(self, config: RunConfig) -> None:
        """Refuse shared grafts: clients would have to agree on them."""
        if config.graft.sharing != "personal":
            raise ConfigError(
                f"graft.sharing = {config.graft.sharing!r}",
                "method 'local' sends nothing",
                "set graft.sharing = 'personal'",
            )

    def shared(self, names: Collection[str]) -> set[str]:
        """Return no names: nothing is shared."""
        return set()

    def train(self, turn: Turn) -> TrainResult:
        """Train everything together."""
        return turn.fit(hooks=StepHooks(around_batch=graft_dropout(turn)))

    def personalize(self, turn: Turn) -> TrainResult:
        """Train as in a round: everything is personal."""
        return self.train(turn)


class LocalLoRA(Method):
    """Each client trains alone, with a personal LoRA.

    Source: no paper; the bound that a federation has to beat for a silo to join it.
    Client i minimises its own f_i(theta_i) over all rounds; nothing couples the clients.
    Trained: attention LoRA. Sent: nothing. Aggregated: nothing. Stays: attention LoRA. Inference: the client's own
    LoRA.
    Open choices: the LoRA is personal, so its rate is ``training.personal_lr`` if that is set. Training is
    continuous, except that every round has a new AdamW; ``training.personal_moments = "kept"`` ends this
    too. ``local`` is this bound with FLEx's graft.
    """

    name = "local_lora"
    summary = "attention LoRA trained on the client's own rows; nothing is sent"
    source = "bound; no paper"
    sends = "nothing"
    keeps = "attention LoRA"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")
    additive = False

    def shared(self, names: Collection[str]) -> set[str]:
        """Return no names: nothing is shared."""
        return set()
