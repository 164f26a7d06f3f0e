"""A finished run in use: the models of its clients and of those that joined later, from the run directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.client.answer_limit import answer_limit, with_recorded_limit
from flexperts.client.client import Client
from flexperts.client.model import ClientModel
from flexperts.client.request import Request
from flexperts.client.workspace import Workspace
from flexperts.config.data import GIVEN, ClientFiles, DataConfig
from flexperts.config.names import normal
from flexperts.config.run import RunConfig
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.data.sources import HUB
from flexperts.data.tables import kept_given
from flexperts.data.unchanged import check_same_rows, check_unchanged, read_manifest
from flexperts.errors import ArtifactError, ConfigError, DataError, ModelError
from flexperts.evaluation.generation import Answer, generate
from flexperts.evaluation.scores import Scores
from flexperts.methods.kit.candidates import states_of
from flexperts.methods.kit.method import Method, OnBatch, State
from flexperts.methods.registry import make_method
from flexperts.modeling.forward import Precision
from flexperts.modeling.load import LoadedBase
from flexperts.observer import Observer
from flexperts.parameters.store import check_personal
from flexperts.recipe import check_trust, located, recorded_recipe
from flexperts.server.checkpoint import load_server

_ASSUMED = {"format": "auto", "on_bad_row": "refuse"}
"""Settings of a joined client that its record leaves out."""


class TrainedRun:
    """The models of a run directory.

    Rows are only read when they are scored or trained on: using a model needs no rows.

    Args:
        path: The run directory.
        workspace: The run's base and rows, if they are in memory already.
        base: Folder of the base, if it is not where the recipe says.
        trust_remote_code: Whether code of the base may run; a recipe that asks for it is refused otherwise.

    Raises:
        ArtifactError: The directory holds no finished run, or its files do not fit the base.
        ConfigError: Its recipe asks to run code of the base, and the caller does not.
        ModelError: The base cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        workspace: Workspace | None = None,
        *,
        base: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.run = RunDirectory.open(path)
        self.summary = self.run.summary()
        self.config = with_recorded_limit(
            recipe_of(self.run, base, trusted=trust_remote_code or workspace is not None), self.summary
        )
        same_rows = partial(check_same_rows, self.run.partition)
        self.workspace = workspace or Workspace(self.config, started_with=same_rows, given=kept_given(path))
        self._check_base()
        self.model = ClientModel(self.workspace.base, self.config, make_method(self.config.method))
        self.server = load_server(self.run.checkpoint)
        self.joined = self.run.joined()
        self._workspaces: dict[str, Workspace] = {}

    def _check_base(self) -> None:
        """Refuse a base that is not the one on which the run's weights were trained."""
        its, ours = self.summary["base"]["fingerprint"], self._base().fingerprint
        if its != ours:
            raise ArtifactError(
                f"{self.run.path} belongs to base {its[:12]}, and {self.config.model.base} is base {ours[:12]}",
                "the run's own base is needed",
                "give the path of that base as --base",
            )

    def _base(self) -> LoadedBase:
        try:
            return self.workspace.base
        except ModelError as error:
            raise elsewhere(error) from error

    def close(self) -> None:
        """Remove the adapters from the base."""
        self.model.close()

    @cached_property
    def clients(self) -> list[str]:
        """Names of the run's clients that have a model; see ``RunDirectory.clients``."""
        return self.run.clients

    @property
    def participants(self) -> list[str]:
        """Names of the clients that the summary scores."""
        return sorted(self.summary["clients"])

    @property
    def scored(self) -> list[str]:
        """Names of the clients that have scores: those of the summary, and those that joined later."""
        return sorted({*self.participants, *self.joined})

    def client(self, name: str, observer: Observer | None = None) -> Client:
        """Return a client with its stored personal state.

        Args:
            name: The client's name.
            observer: Receives progress.

        Raises:
            ConfigError: The run has no such client.
            ArtifactError: Its personal state is missing, not complete, or of another base.
        """
        name = normal(name)
        if name not in self.clients:
            raise ConfigError(f"client {name!r}", f"the run's clients are {', '.join(self.clients)}", "choose one")
        client = Client(name, self._workspace_of(name), self.model, self.run.path, observer)
        # A client without its state must not start with a new one; a damaged one is refused when it is loaded.
        check_personal(client.store.path, base=self.workspace.base.fingerprint)
        return client

    def _workspace_of(self, name: str) -> Workspace:
        if name not in self.joined:
            return self.workspace
        if name not in self._workspaces:
            self._workspaces[name] = workspace_of(self.run.path, self.joined[name], self.workspace)
        return self._workspaces[name]

    def encoder_of(self, name: str) -> PromptEncoder:
        """Return the encoder of a client's prompts; its rows and state are not read."""
        name = normal(name)
        return self._workspace_of(name).encoder_for(name)

    def request(self, name: str) -> Request:
        """Return the request with which a client uses the finished model, as the server would send it."""
        return Request(self.model.method.final(self.server, normal(name)), self.server.agreement, self.round)

    @property
    def round(self) -> int:
        """The round after which the models are used."""
        return self.server.round

    @property
    def states(self) -> tuple[State, ...]:
        """The states in which a client's model can be used, its own one last."""
        return states_of(self.model.method, self.config, self.round)

    def state(self, name: str | None) -> State:
        """Return a model state by name, the most personal one by default; see ``state_named``."""
        return state_named(self.model.method, self.config, self.round, name)

    def generate(
        self,
        client: str,
        instruction: str,
        context: str = "",
        state: str | None = None,
        *,
        max_new_tokens: int | None = None,
        before: Sequence[Mapping[str, str]] = (),
        plain: bool = False,
    ) -> Answer:
        """Return a client's greedy answer to one instruction; its ``cut`` says whether the limit ended it.

        Args:
            client: The client whose model answers.
            instruction: The instruction.
            context: The passage that it is about.
            state: Name of the model state; the most personal one by default.
            max_new_tokens: Longest answer in tokens; by default as in the run's evaluation.
            before: The turns of the chat before the instruction, with ``role`` and ``content``.
            plain: Whether the instruction is plain text that the model continues, without a template.

        Raises:
            FlexpertsError: See ``answer_one``, or there is no such client or state.
        """
        asked, chosen = self.client(client), self.state(state)
        how: dict[str, Any] = {"before": before, "plain": plain}
        return answer_one(asked, self.request(client), chosen, instruction, context, max_new_tokens, **how)

    def evaluate(
        self, observer: Observer | None = None, rows: Mapping[str, Sequence[Row]] | None = None
    ) -> dict[str, dict[State, Scores]]:
        """Score clients in every state of the method.

        Args:
            observer: Receives progress.
            rows: Client -> rows to score; by default those of ``own_rows``.

        Raises:
            DataError: The run's rows are not where the recipe says, or are not those that it started with.
        """
        rows, observer = self.own_rows() if rows is None else rows, observer or Observer()
        observer.phase("evaluation", len(rows))
        scored: dict[str, dict[State, Scores]] = {}
        for name, its in sorted(rows.items()):
            client, request = self.client(name, observer), self.request(name)
            scored[name] = client.evaluate(request, self.states, its)
            observer.turn_ended(name)
        return scored

    def own_rows(self) -> dict[str, Sequence[Row]]:
        """Return the rows on which clients have been scored, by client, for all of ``scored``.

        Raises:
            DataError: They are not where the recipe says, or are not those that the run started with.
        """
        try:
            return {name: self.client(name).scored_rows for name in self.scored}
        except DataError as error:
            remedy = f"{error.remedy}; or give rows from another place with `flexperts evaluate --data`"
            raise DataError(error.value, error.rule, remedy) from error


def elsewhere(error: ModelError) -> ModelError:
    """Return the error for a run's base that cannot be loaded; its remedy names the option for another place."""
    return ModelError(error.value, error.rule, f"{error.remedy}; or give its new path as --base")


def recipe_of(run: RunDirectory, base: str | None = None, *, trusted: bool) -> RunConfig:
    """Return a run's recipe.

    Args:
        run: The run.
        base: Folder of its base, if it is not where the recipe says.
        trusted: See ``check_trust``; true also where the base is in memory already.
    """
    config = recorded_recipe(run.path)
    if base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"base": base})})
    check_trust(config, run.path / "config.toml", trusted=trusted)
    return config


def state_named(method: Method, config: RunConfig, number: int, name: str | None) -> State:
    """Return one of a run's states after a round; by default the client's own: chosen, or the most personal one.

    Raises:
        ConfigError: There is no such state, or not yet: a client chooses after the last round.
    """
    states = states_of(method, config, number)
    if name == "chosen" and config.floor and name not in states:
        last = method.total_rounds(config.federation.rounds)
        rule = f"a client chooses after the last round, which is {last}"
        raise ConfigError(f"state 'chosen' after round {number}", rule, f"wait for it, or choose {states[-1]}")
    if name is None:
        return states[-1]
    for state in states:
        if state == name:
            return state
    raise ConfigError(f"state {name!r}", f"{method.name} has the states {', '.join(states)}", "choose one of these")


def answer_one(
    client: Client,
    request: Request,
    state: State,
    instruction: str,
    context: str = "",
    max_new_tokens: int | None = None,
    *,
    before: Sequence[Mapping[str, str]] = (),
    plain: bool = False,
) -> Answer:
    """Return the greedy answer of a client's model in a state to one instruction; see ``TrainedRun.generate``."""
    prompt = prompt_of(client.encoder, instruction, context, before=before, plain=plain)
    [answer] = answer_all(client, request, state, [prompt], max_new_tokens)
    return answer


def prompt_of(
    encoder: PromptEncoder, instruction: str, context: str, *, before: Sequence[Mapping[str, str]], plain: bool
) -> Sequence[int]:
    """Return the tokens of one instruction up to where its answer starts; see ``TrainedRun.generate``."""
    if plain:
        return encoder.tokens.plain(instruction)
    if before:
        content = f"{instruction}\n\n{context}" if context else instruction
        return encoder.conversation([*before, {"role": "user", "content": content}])
    return encoder.prompt(instruction, context)


def answer_all(
    client: Client,
    request: Request,
    state: State,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    batch_size: int = 1,
) -> list[Answer]:
    """Return the greedy answers of a client's model in a state to prompts, in their order.

    Args:
        client: The client.
        request: The finished global model.
        state: The state of the model.
        prompts: Token ids of each prompt, up to where its answer starts.
        max_new_tokens: Longest answer in tokens; by default as in the run's evaluation.
        batch_size: Prompts that are answered together.

    Raises:
        FlexpertsError: A setting is below 1, a prompt is longer than the base reads, or the model computes no
            finite numbers.
    """
    longest = answer_limit(client.workspace, client.config) if max_new_tokens is None else max_new_tokens
    with client.in_state(request, state) as (model, on_batch):
        return answered(
            model,
            client.encoder,
            prompts,
            longest,
            batch_size,
            precision=client.config.model.precision,
            on_batch=on_batch,
            owner=client.name,
            state=state,
        )


def answered(
    model: Any,
    encoder: PromptEncoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    precision: Precision,
    on_batch: OnBatch | None,
    owner: str,
    state: str,
) -> list[Answer]:
    """Return greedy answers, each within the positions that the base reads; see ``generate`` and ``answer_all``."""
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} = {value}", "it must be at least 1", "raise it to 1 or more")
    most = encoder.positions
    if most is not None and (longest := max(map(len, prompts), default=0)) >= most:
        raise DataError(f"a prompt of {longest} tokens", f"the base reads at most {most}", "shorten the prompt")
    limits = [max_new_tokens if most is None else min(max_new_tokens, most - len(prompt)) for prompt in prompts]
    answers: dict[int, Answer] = {}
    for limit in sorted(set(limits)):  # usually one
        chosen = [index for index, its in enumerate(limits) if its == limit]
        asked = [prompts[index] for index in chosen]
        settings: Any = {"max_new_tokens": limit, "batch_size": batch_size, "precision": precision}
        answers |= zip(chosen, generate(model, encoder, asked, **settings, on_batch=on_batch), strict=True)
    if not all(answer.finite for answer in answers.values()):
        cause = "the base" if state == "zero_shot" else "diverged training, or the base"
        rule = f"its logits are not finite numbers, so it has no answer; the cause is {cause}"
        raise ModelError(f"{owner}'s {state} model", rule, "see not_finite in the run's summary.json")
    return [answers[index] for index in range(len(prompts))]


def with_rows_of(config: RunConfig, name: str, files: ClientFiles) -> RunConfig:
    """Return a run with the rows of one given client only; the settings for holding out rows stay the run's."""
    data = DataConfig(clients={name: files}, **config.data.held_out())
    return config.model_copy(update={"data": data})


def left_out_rows(run: RunDirectory, config: RunConfig, name: str) -> RunConfig:
    """Return a run with the rows of one client only, which its recipe leaves out."""
    others = {*read_manifest(run.partition), *map(normal, config.data.leave_out or ())} - {name}
    data = config.data.model_copy(update={"leave_out": tuple(sorted(others))})
    return config.model_copy(update={"data": data})


def workspace_of(run: Path, record: Mapping[str, Any], workspace: Workspace) -> Workspace:
    """Return the workspace of a client that joined later: its rows, and the base of the run's workspace.

    Rows are read when they are needed, and refused if they are not those with which it joined.
    """
    name, data = record["client"], record["data"]
    same = partial(check_unchanged, {name: record["rows"]}, rule=f"{name} joined with other rows")
    if data is None:
        config = left_out_rows(RunDirectory(run), workspace.config, name)
        return Workspace(config, workspace.base, workspace.untouched, same, given=workspace.given)
    files = {"train": _from(run, data["train"]), "test": data["test"] and _from(run, data["test"])}
    config = with_rows_of(workspace.config, name, ClientFiles(**own_of_record(data) | files))
    return Workspace(config, workspace.base, workspace.untouched, same, given=workspace.given)


def kept_data(run: Path, files: ClientFiles) -> dict[str, Any]:
    """Return the record's data settings; paths are relative to the run, so that they reveal as little as needed."""
    assert files.train is not None
    own = {name: value for name, value in files.own.items() if value != _ASSUMED.get(name)}
    test = files.test and _seen_from(run, files.test)
    return {"columns": {}, **own, "train": _seen_from(run, files.train), "test": test}


def own_of_record(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a joined client's own settings from its record's data settings."""
    return {**_ASSUMED, **{name: value for name, value in data.items() if name not in ("train", "test")}}


def _seen_from(run: Path, source: str) -> str:
    return source if source.startswith((HUB, GIVEN)) else Path(os.path.relpath(source, run.resolve())).as_posix()


def _from(run: Path, source: str) -> str:
    return located(source, run)
