"""Where a personal model comes from: a run directory, or a folder that an export wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from flexperts.data.prompts import PromptEncoder
from flexperts.errors import ConfigError
from flexperts.evaluation.generation import Answer
from flexperts.export.exporting import export_run
from flexperts.finished.trained import TrainedRun, answer_all
from flexperts.methods.kit.method import State


class Home(Protocol):
    """What a personal model needs of the place that it comes from."""

    @property
    def place(self) -> Path:
        """The run directory or folder."""

    @property
    def state(self) -> str:
        """The state of the model."""

    @property
    def encoder(self) -> PromptEncoder:
        """The encoder of prompts."""

    def answers(self, prompts: Sequence[Sequence[int]], limit: int | None, batch: int | None) -> list[Answer]:
        """Return the greedy answers to prompts; limits as for ``PersonalModel.generate``."""

    @contextmanager
    def in_use(self) -> Iterator[Any]:
        """Yield the torch model."""

    def write(self, folder: Path, form: str | None) -> None:
        """Write the model as a folder, in one of the forms of an export; None is the smallest."""


class RunHome:
    """A client of a run.

    Args:
        path: The run directory.
        opened: Returns the run; it is opened on first use.
        client: The client's name.
        state: The state of its model.
    """

    def __init__(self, path: Path, opened: Callable[[], TrainedRun], client: str, state: State) -> None:
        self.place, self.state = path, state
        self._opened, self._client = opened, client

    @property
    def encoder(self) -> PromptEncoder:
        """See ``Home``."""
        return self._opened().client(self._client).encoder

    def answers(self, prompts: Sequence[Sequence[int]], limit: int | None, batch: int | None) -> list[Answer]:
        """See ``Home``."""
        run = self._opened()
        size = run.config.evaluation.batch_size if batch is None else batch
        return answer_all(run.client(self._client), run.request(self._client), self.state, prompts, limit, size)

    @contextmanager
    def in_use(self) -> Iterator[Any]:
        """See ``Home``."""
        run = self._opened()
        with run.client(self._client).in_state(run.request(self._client), self.state) as (model, on_batch):
            if on_batch is not None:
                rule = "it sets the model up for every batch, so no single torch model computes what it does"
                raise ConfigError(f"method {run.config.method.name!r}", rule, "use generate or chat")
            yield model

    def write(self, folder: Path, form: str | None) -> None:
        """See ``Home``."""
        model = self._opened().config.model
        known: dict[str, Any] = {"base": model.base, "trust_remote_code": model.trust_remote_code}
        export_run(self.place, folder, client=self._client, form=form, state=self.state, **known)
