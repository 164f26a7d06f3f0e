"""A simulated round: silos train by the client's own code, and what an observer gets is returned.

The observer is the server: it sees every silo's update as it leaves the silo, or with secure aggregation the mean
that it unmasks. With central noise, which hides nothing from the server, the observer is another silo.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flexperts.client.client import Client, Resident
from flexperts.client.request import Request, Trained
from flexperts.client.workspace import Workspace
from flexperts.communication.messages import DERIVED
from flexperts.config.federation import CompressionConfig, PrivacyConfig
from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients
from flexperts.data.rows import ClientRows
from flexperts.errors import DataError
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload, Vector
from flexperts.protection.pipeline import is_secure, protections, reduced
from flexperts.protection.secure import rules_of


@dataclass(frozen=True)
class Setting:
    """One row of the audit's table: how a round is trained and protected.

    Args:
        name: Its name on the command line and in the table.
        about: What it is, in a few words.
        training: Changes of the recipe's [training].
        privacy: Changes of the recipe's [privacy], from all defences off; None leaves the recipe's own defences.
        silos: Silos that train; only as many as the observer's view depends on.
        rows: Train rows of the audited silo: ``all``, those of one ``batch``, or ``one``.
    """

    name: str
    about: str
    training: Mapping[str, Any]
    privacy: Mapping[str, Any] | None
    silos: int
    rows: str = "all"

    def config(self, recipe: RunConfig) -> RunConfig:
        """Return the recipe with this setting's changes."""
        training = recipe.training.model_copy(update=dict(self.training))
        everyone = {"participation": 1.0}  # of the setting's silos
        federation = recipe.federation.model_copy(update=everyone)
        config = recipe.model_copy(update={"training": training, "federation": federation})
        if self.privacy is None:
            return config
        kept = {"clip": recipe.privacy.clip, "noise_multiplier": recipe.privacy.noise_multiplier}
        federation = federation.model_copy(update={"aggregation": "mean"})
        off = {"compression": CompressionConfig(), "protections": {}, "federation": federation}
        return config.model_copy(update={**off, "privacy": PrivacyConfig(**kept, **self.privacy)})


CONTROL = "control"


def settings_of(recipe: RunConfig, clients: int, secure: tuple[int, ...]) -> list[Setting]:
    """Return the rows of the table.

    Args:
        recipe: The audited recipe.
        clients: Its number of clients.
        secure: Numbers of silos in the rows with secure aggregation.
    """
    one_step = {"local_steps": 1}
    # The exact gradient: an optimizer without a state, and a rate at which fp32 weights do not round it.
    gradient = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "personal_moments": "fresh"}
    epochs = recipe.training.local_epochs * 4
    longer = {"local_steps": recipe.training.local_steps * 4 if recipe.training.local_steps else None}
    drawn = recipe.federation.drawn(clients)
    return [
        Setting(CONTROL, "one row, one step: the positive control", one_step | gradient, {}, 1, "one"),
        Setting("one step", "one step on one batch", one_step, {}, 1, "batch"),
        Setting("plain", "the recipe's steps, no defence", {}, {}, 1),
        Setting("many steps", "four times the recipe's steps", {"local_epochs": epochs, **longer}, {}, 1),
        Setting("local noise", "the silo clips and adds noise", {}, {"noise": "local"}, 1),
        Setting("central noise", "another silo's view of the mean", {}, {"noise": "central"}, max(3, drawn)),
        *(Setting(f"secure {n}", f"the sum of {n} silos", {}, {"aggregation": "secure"}, n) for n in secure),
        *([Setting("recipe", "the recipe with its own defences", {}, None, drawn)] if protections(recipe) else []),
    ]


def dealt(clients: Clients, audited: str, most: int) -> list[Clients]:
    """Deal every client's train rows to as many parts as it takes for ``most`` silos; each part has all clients.

    Test rows are the same in all parts. The audited client comes first in each.

    Raises:
        DataError: The audited client would have fewer than two rows.
    """
    parts = ceil(most / len(clients))
    have = len(clients[audited].train)
    if have < 2 * parts:
        raise DataError(
            f"{audited}: {have} train rows for {parts} parts",
            f"the rows of {len(clients)} clients are divided among {most} silos, each with two rows at least",
            "lower --silos, or audit a client with more rows by --client",
        )
    names = [audited, *(name for name in clients if name != audited)]
    return [{n: replace(clients[n], train=clients[n].train[part::parts]) for n in names} for part in range(parts)]


@dataclass(frozen=True)
class Observed:
    """What an observer has after a round, and the model to attack it with.

    Args:
        client: The audited silo, whose model scores rows.
        before: The shared weights that were sent.
        after: These weights with the update that the observer sees.
        round: The round.
        agreement: The method's agreement.
        steps: Optimizer steps of the audited silo.
    """

    client: Client
    before: Payload
    after: Payload
    round: int
    agreement: Any
    steps: int

    @cached_property
    def change(self) -> dict[str, Any]:
        """The update that the observer sees, by tensor."""
        before = self.before.tensors()
        return {name: tensor - before[name] for name, tensor in self.after.tensors().items()}

    @property
    def request(self) -> Request:
        """The request with which a client uses the weights that the observer sees."""
        return Request(self.after, self.agreement, self.round)


class Simulation:
    """Rounds that all start from one state of a run.

    Args:
        workspace: The run's base and encoders.
        server: The server's state.
        silos: Silo -> its rows; the first one is audited.
        personal: Folder of the clients' personal states; a silo that has none there starts with a new one.
    """

    def __init__(self, workspace: Workspace, server: Server, silos: Clients, personal: Path) -> None:
        self.workspace, self.server, self.silos, self.personal = workspace, server, silos, personal
        self.audited = next(iter(silos))

    @contextmanager
    def observed(self, setting: Setting, config: RunConfig, rows: ClientRows) -> Iterator[Observed]:
        """Train one round and yield what the observer sees.

        Args:
            setting: The setting.
            config: The recipe with the setting's changes.
            rows: The audited silo's rows.
        """
        rounds = max(config.federation.rounds, self.server.round + 1)
        evaluation = config.evaluation.model_copy(update={"max_new_tokens": 1})
        federation = config.federation.model_copy(update={"rounds": rounds})
        config = config.model_copy(update={"federation": federation, "evaluation": evaluation})
        silos = {**dict([*self.silos.items()][: setting.silos]), self.audited: rows}
        with TemporaryDirectory() as folder:
            if self.personal.exists():
                shutil.copytree(self.personal, Path(folder) / "personal")
            resident = Resident(self.workspace.with_clients(config, silos), config, Path(folder))
            try:
                yield self._round(resident, config, sorted(silos))
            finally:
                resident.model.close()

    def _round(self, resident: Resident, config: RunConfig, names: list[str]) -> Observed:
        number, server = self.server.round + 1, replace(self.server, rounds=config.federation.rounds)
        sent = resident.model.method.broadcast(server, self.audited)
        request = Request(sent, self.server.agreement, number)
        kept = Payload.of({n: t for n, t in sent.tensors().items() if not n.startswith(DERIVED)})
        alone = not is_secure(config) and config.privacy.noise != "central"
        trained = {n: resident.client(n).train(request) for n in ([self.audited] if alone else names)}
        own = trained[self.audited].update
        if alone:
            after = own.vector
        elif is_secure(config):
            after = kept.vector + _unmasked(config, list(trained.values()))
        else:
            [mean] = reduced(config, kept, [its.update for its in trained.values()])
            after = mean.vector
        client, steps = resident.client(self.audited), int(own.metrics["steps"])
        return Observed(client, kept, Payload(kept.manifest, after), number, self.server.agreement, steps)


def _unmasked(config: RunConfig, trained: Sequence[Trained]) -> Vector:
    """Return the mean that a server unmasks: its sum is, bit for bit, the sum of the silos' whole numbers."""
    numbers = rules_of(config.privacy).numbers(len(trained))
    counts = [1 if config.privacy.noise == "distributed" else its.update.rows for its in trained]
    total: Any = 0
    for its, rows in zip(trained, counts, strict=True):
        assert its.sent.change is not None  # a masked update always has it
        total = total + numbers.encode(its.sent.change, rows / max(counts))
    return np.asarray(numbers.decode(total) / (sum(counts) / max(counts)), dtype=np.float32)
