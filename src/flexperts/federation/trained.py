"""A finished run in use: its clients' models, loaded again from the run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from flexperts.artifacts import RunDirectory
from flexperts.config.run import RunConfig
from flexperts.data.rows import Row
from flexperts.data.unchanged import check_same_rows
from flexperts.errors import ArtifactError, ConfigError, DataError, ModelError
from flexperts.evaluation.generation import generate
from flexperts.evaluation.scores import Scores
from flexperts.federation.checkpoint import load_server
from flexperts.federation.client import Client
from flexperts.federation.client_model import ClientModel
from flexperts.federation.joined import workspace_of
from flexperts.federation.observer import Observer
from flexperts.federation.request import Request
from flexperts.federation.workspace import Workspace
from flexperts.methods.base import Method, State
from flexperts.methods.registry import make_method
from flexperts.modeling.load import LoadedBase
from flexperts.parameters.store import load_personal
from flexperts.recipe import parse_recipe


class TrainedRun:
    """The models of a run directory.

    Rows are read when they are scored or trained on, and not before: to use a model takes none.

    Args:
        path: The run directory.
        workspace: The run's base and rows, where they are in memory already.
        base: Where the base lies, if not where the recipe says.

    Raises:
        ArtifactError: The directory holds no finished run, or its files do not fit the base.
        ModelError: The base cannot be loaded.
    """

    def __init__(self, path: Path, workspace: Workspace | None = None, *, base: str | None = None) -> None:
        self.run = RunDirectory.open(path)
        self.summary = self.run.summary()
        self.config = recipe_of(self.run, base)
        same_rows = partial(check_same_rows, self.run.partition)
        self.workspace = workspace or Workspace(self.config, started_with=same_rows)
        self._check_base()
        self.model = ClientModel(self.workspace.base, self.config, make_method(self.config.method))
        self.server = load_server(self.run.checkpoint)
        self.joined = self.run.joined()
        self._workspaces: dict[str, Workspace] = {}

    def _check_base(self) -> None:
        """Refuse another base than the one that the run's weights were trained on."""
        its, ours = self.summary["base"]["fingerprint"], self._base().fingerprint
        if its != ours:
            raise ArtifactError(
                f"{self.run.path} belongs to base {its[:12]}, and {self.config.model.base} is base {ours[:12]}",
                "the run's base is needed",
                "give that one as --base",
            )

    def _base(self) -> LoadedBase:
        try:
            return self.workspace.base
        except ModelError as error:
            raise ModelError(error.value, error.rule, f"{error.remedy}; --base says where it lies now") from error

    def close(self) -> None:
        """Take the adapters out of the base again."""
        self.model.close()

    @property
    def clients(self) -> list[str]:
        """Names of the run's clients: those who took part, and those who joined after training."""
        return sorted({*self.participants, *self.joined})

    @property
    def participants(self) -> list[str]:
        """Names of the clients whom the summary scores."""
        return sorted(self.summary["clients"])

    def client(self, name: str, observer: Observer | None = None) -> Client:
        """Return a client on its stored personal state.

        Args:
            name: The client.
            observer: Receives progress.

        Raises:
            ConfigError: The run has no such client.
            ArtifactError: Its personal state is missing, damaged or of another base.
        """
        if name not in self.clients:
            raise ConfigError(f"client {name!r}", f"the run's clients are {', '.join(self.clients)}", "choose one")
        client = Client(name, self._workspace_of(name), self.model, self.run.path, observer)
        # A missing or damaged state must not start afresh.
        load_personal(client.store.path, base=self.workspace.base.fingerprint)
        return client

    def _workspace_of(self, name: str) -> Workspace:
        if name not in self.joined:
            return self.workspace
        if name not in self._workspaces:
            self._workspaces[name] = workspace_of(self.run.path, self.joined[name], self.workspace)
        return self._workspaces[name]

    def request(self, name: str) -> Request:
        """Return what the server would send a client now, so that it computes with the finished model."""
        return Request(self.model.method.final(self.server, name), self.server.agreement, self.server.round)

    def state(self, name: str | None) -> State:
        """Return a model state by name, the most personal one by default; see ``state_named``."""
        return state_named(self.model.method, name)

    def generate(self, client: str, instruction: str, context: str = "", state: str | None = None) -> str:
        """Return a client's greedy answer to one instruction."""
        return answer_one(self.client(client), self.request(client), self.state(state), instruction, context)

    def evaluate(
        self, observer: Observer | None = None, rows: Mapping[str, Sequence[Row]] | None = None
    ) -> dict[str, dict[State, Scores]]:
        """Score clients in every state of the method.

        Args:
            observer: Receives progress.
            rows: Client -> rows to score it on; without them every client's that the run itself has scored.

        Raises:
            DataError: The run's rows are not where the recipe says, or no longer those that it started with.
        """
        rows = self._own_rows() if rows is None else rows
        scored: dict[str, dict[State, Scores]] = {}
        for name, its in sorted(rows.items()):
            client, request = self.client(name, observer), self.request(name)
            scored[name] = {state: client.score(request, state, its) for state in self.model.method.states}
        return scored

    def _own_rows(self) -> dict[str, Sequence[Row]]:
        try:
            return {name: self.client(name).scored_rows for name in self.clients}
        except DataError as error:
            remedy = f"{error.remedy}; `flexperts evaluate --data` scores rows from elsewhere"
            raise DataError(error.value, error.rule, remedy) from error


def recipe_of(run: RunDirectory, base: str | None = None) -> RunConfig:
    """Return a run's recipe.

    Args:
        run: The run.
        base: Where its base lies, if not where the recipe says.
    """
    config = parse_recipe(run.config_toml, where=str(run.path / "config.toml"))
    return (
        config
        if base is None
        else config.model_copy(update={"model": config.model.model_copy(update={"base": base})})
    )


def state_named(method: Method, name: str | None) -> State:
    """Return a method's state by name, the most personal one by default.

    Raises:
        ConfigError: The method has no such state.
    """
    if name is None:
        return method.states[-1]
    for state in method.states:
        if state == name:
            return state
    raise ConfigError(
        f"state {name!r}", f"{method.name} has the states {', '.join(method.states)}", "choose one of these"
    )


def answer_one(client: Client, request: Request, state: State, instruction: str, context: str = "") -> str:
    """Return a client's greedy answer to one instruction, by its model in a state."""
    encoder = client.workspace.encoder
    with client.in_state(request, state) as (model, on_batch):
        answers = generate(
            model,
            encoder,
            [encoder.prompt(instruction, context)],
            max_new_tokens=client.config.evaluation.max_new_tokens,
            batch_size=1,
            precision=client.config.model.precision,
            on_batch=on_batch,
        )
    return answers[0]
