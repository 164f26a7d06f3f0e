"""A finished run for a program or a notebook: its scores, and the models of its clients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.names import normal
from flexperts.data.sources import read_source
from flexperts.data.tables import given_source
from flexperts.errors import ConfigError
from flexperts.evaluation.scores import kinds_in
from flexperts.files import placeless
from flexperts.finished.trained import TrainedRun, state_named
from flexperts.library.homes import RunHome
from flexperts.library.personal import PersonalModel
from flexperts.methods.registry import make_method
from flexperts.recipe import located, recorded_recipe

Table = dict[str, dict[str, dict[str, float]]]
"""Score -> client -> state of the model -> value."""


class Run:
    """A finished run. Scores are read at once; the base loads when a model is first used.

    Args:
        path: The run directory.
        workspace: The run's base and rows, if they are in memory already.
        base: Folder or hub id of the base, if it is not where the recipe says.
        trust_remote_code: Whether code of the base may run; a recipe that asks for it is refused otherwise.

    Raises:
        ArtifactError: The directory holds no finished run.
    """

    def __init__(
        self,
        path: str | Path,
        workspace: Workspace | None = None,
        *,
        base: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.directory = RunDirectory.open(Path(path))
        """The run's files."""
        self.summary = self.directory.summary()
        """What summary.json holds."""
        self._joined = self.directory.joined()
        self._workspace, self._trusted = workspace, trust_remote_code
        self._base = None if base is None else str(base)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @cached_property
    def clients(self) -> list[str]:
        """Names of the clients that have a model here, also without scores, and of those that joined later."""
        return self.directory.clients

    @property
    def _scored(self) -> dict[str, Any]:
        return {**self.summary["clients"], **self._joined}

    @property
    def scores(self) -> Table:
        """The run's scores: ``scores["nll"]["clinic"]["personalized"]``.

        ``rouge_l`` is in points of 100, ``nll`` in nats per token of the answer; runs on preferences also have
        ``reward_margin`` and ``reward_accuracy``. States that the method does not have, or without a finite score,
        are left out. ``pandas.DataFrame(run.scores["nll"]).T`` is a table.
        """
        return {
            kind: {
                name: {state: value for state, value in its[kind].items() if value is not None}
                for name, its in sorted(self._scored.items())
            }
            for kind in kinds_in(next(iter(self._scored.values())))
        }

    def model(self, client: str, state: str | None = None) -> PersonalModel:
        """Return a client's model.

        Args:
            client: The client's name.
            state: zero_shot, global, personalized or chosen; by default the most personal one.

        Raises:
            ConfigError: The run has no such client or state.
        """
        name, config = normal(client), recorded_recipe(self.path)
        if name not in self.clients:
            raise ConfigError(f"client {name!r}", f"the run's clients are {', '.join(self.clients)}", "choose one")
        chosen = state_named(make_method(config.method), config, self.summary["rounds"], state)
        return PersonalModel(name, RunHome(self.path, lambda: self._trained, name, chosen))

    def evaluate(self, rows: Mapping[str, Any] | None = None) -> Table:
        """Score clients' models again, in every state of the method.

        Args:
            rows: Client -> rows to score: a data set, a table, a list of mappings or a file, as for ``federate``.
                By default the rows that the run itself has scored, if they are in memory or where it read them.

        Returns:
            As ``scores``.

        Raises:
            DataError: Rows break a rule, or the run's own rows are not at hand.
        """
        read = None if rows is None else {normal(name): self._read(name, its) for name, its in rows.items()}
        found = self._trained.evaluate(rows=read)
        return {
            kind: {
                name: {str(s): value for s, its in states.items() if (value := its.metrics().get(kind)) is not None}
                for name, states in found.items()
            }
            for kind in kinds_in(
                {kind for states in found.values() for its in states.values() for kind in its.metrics()}
            )
        }

    def _read(self, name: str, rows: Any) -> Any:
        data, source, given = self._trained.config.data.of_client(name), given_source(name, "test"), {}
        if isinstance(rows, str | Path):
            source = located(str(rows), Path())
        else:
            given[source] = rows
        kind, on_bad_row = data.format, data.on_bad_row
        return read_source(source, data.columns, split="test", format=kind, on_bad_row=on_bad_row, given=given)

    @cached_property
    def _trained(self) -> TrainedRun:
        """The run with its base in memory, which its models share."""
        return TrainedRun(self.path, self._workspace, base=self._base, trust_remote_code=self._trusted)

    def close(self) -> None:
        """Free the base; a model that is used afterwards loads it again."""
        if (trained := self.__dict__.pop("_trained", None)) is not None:
            trained.close()
        self._workspace = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        rounds, base = self.summary["rounds"], placeless(self.summary["base"]["name"])
        plural = "" if rounds == 1 else "s"
        what = f"{self.summary['method']} on {base}, {rounds} round{plural}"
        return f"Run({str(self.path)!r}: {what}; clients {', '.join(self.clients)})"
