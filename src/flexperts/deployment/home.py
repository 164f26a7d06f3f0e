"""A deployed run's personal model at its silo: the private state with the last shared weights it received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import RecordDict

from flexperts.artifacts import RunDirectory
from flexperts.client.answer import request_of
from flexperts.client.client import Client, Resident
from flexperts.client.request import Request
from flexperts.client.workspace import Workspace
from flexperts.communication.schema import EvaluateRequest
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.silo import SiloConfig
from flexperts.data.prompts import PromptEncoder
from flexperts.deployment.kept import with_kept_choices
from flexperts.deployment.settings import for_silo
from flexperts.deployment.state import private_folder
from flexperts.errors import ArtifactError
from flexperts.evaluation.generation import Answer
from flexperts.files import write_bytes
from flexperts.finished.trained import TrainedRun, answer_one, state_named
from flexperts.methods.registry import make_method
from flexperts.observer import Observer
from flexperts.recipe import recorded_recipe

RECEIVED = "received.safetensors"


def keep_received(folder: Path, content: RecordDict) -> None:
    """Write an evaluation's request atomically: the last global weights that the silo received."""
    write_bytes(folder / RECEIVED, serialize({}, content))


class HomeModel:
    """A silo's models of one run.

    Args:
        silo: The silo's settings.
        run: The run's id.
    """

    def __init__(self, silo: SiloConfig, run: str) -> None:
        folder = private_folder(Path(silo.state), run)
        try:
            _, content = deserialize((folder / RECEIVED).read_bytes())
        except FileNotFoundError as error:
            raise ArtifactError(
                f"run {run}",
                "this silo has not yet received its final shared weights",
                "wait for its evaluation on the server",
            ) from error
        self.request, _ = request_of(content, EvaluateRequest)
        recipe = recorded_recipe(RunDirectory.open(folder).path)
        config = with_kept_choices(for_silo(recipe, silo), folder)
        self.method = make_method(config.method)
        self.client = Resident(Workspace(config), config, folder).client(silo.name)

    def generate(
        self,
        instruction: str,
        context: str = "",
        state: str | None = None,
        *,
        max_new_tokens: int | None = None,
        before: Sequence[Mapping[str, str]] = (),
    ) -> Answer:
        """Return the greedy answer to one instruction, by the silo's own model unless a state is named.

        After the last round of a run with a floor its own model is the one that it chooses, which may train a local
        model first; before that it is the most personal one.

        Args:
            instruction, context, state, max_new_tokens, before: As for ``TrainedRun.generate``.
        """
        chosen = state_named(self.method, self.client.config, self.request.round, state)
        asked = instruction, context, max_new_tokens
        return answer_one(self.client, self.request, chosen, *asked, before=before)


class HomeRun(TrainedRun):
    """The same models with the interface of a whole run, for serving them.

    Args:
        silo, run: See ``HomeModel``.
    """

    def __init__(self, silo: SiloConfig, run: str) -> None:
        # Without super().__init__(): the files that it reads are at the server.
        self._home, self._name = HomeModel(silo, run), silo.name
        client = self._home.client
        self.config, self.workspace, self.model = client.config, client.workspace, client.model

    @property
    def clients(self) -> list[str]:
        """The silo's name alone."""
        return [self._name]

    def client(self, name: str, observer: Observer | None = None) -> Client:
        """Return the silo as a client."""
        return self._home.client

    def encoder_of(self, name: str) -> PromptEncoder:
        """Return the encoder of the silo's prompts."""
        return self._home.client.encoder

    @property
    def round(self) -> int:
        """The round that the silo received last."""
        return self._home.request.round

    def request(self, name: str) -> Request:
        """Return the last request that the silo received."""
        return self._home.request
