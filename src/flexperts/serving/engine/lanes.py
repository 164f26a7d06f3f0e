"""Lanes: how the base is set up for a batch, for rows of many models together or for one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from flexperts.data.batches import PaddedBatch
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.method import OnBatch
from flexperts.serving.contract import ModelName
from flexperts.serving.engine.additions import Additions, additions, all_models
from flexperts.serving.engine.mixed_grafts import MixedGrafts
from flexperts.serving.engine.mixed_lora import MixedLora


class Lane(Protocol):
    """Models whose rows may share a batch."""

    @property
    def one_row(self) -> bool:
        """Whether a batch may have one row only; valid while the lane is open."""

    def opened(self) -> AbstractContextManager[None]:
        """Set the base up inside the block."""

    def read(self, prompts: PaddedBatch) -> None:
        """Prepare for the prompts that are read next."""

    def select(self, models: Sequence[ModelName]) -> None:
        """Prepare for the rows that are computed next, given by their models."""


class MixedLane:
    """A lane for the rows of all models that add only LoRA and grafts to the base.

    Args:
        trained: The run.
        models: What each model adds.
    """

    one_row = False

    def __init__(self, trained: TrainedRun, models: Mapping[ModelName, Additions]) -> None:
        self._trained = trained
        # Keys only, so that values which many models share are stored once.
        self._keys = {name: (added.lora_key, added.graft_key) for name, added in models.items()}
        dtype = torch.bfloat16 if trained.config.model.precision == "bf16" else torch.float32
        adapters = {added.lora_key: added.lora for added in models.values() if added.lora_key}
        grafts = {added.graft_key: added.grafts for added in models.values() if added.graft_key}
        self._lora, self._grafts = MixedLora(trained.model.base.model, adapters, dtype), MixedGrafts(grafts)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Disable the run's adapters and attach all models inside the block."""
        with self._trained.model.lora.use(), self._lora.attached(), self._grafts.attached():
            yield

    def read(self, prompts: PaddedBatch) -> None:
        """Do nothing: these models do not depend on the prompts."""

    def select(self, models: Sequence[ModelName]) -> None:
        """Select for every row what its model adds."""
        self._lora.select([self._keys[model][0] for model in models])
        self._grafts.select([self._keys[model][1] for model in models])


class OwnLane:
    """A lane for the rows of one model, on the base as evaluation sets it up; it supports every method.

    Args:
        trained: The run.
        model: The model.
    """

    def __init__(self, trained: TrainedRun, model: ModelName) -> None:
        self._trained, self._model = trained, model
        self._on_batch: OnBatch | None = None

    @property
    def one_row(self) -> bool:
        """Whether the method sets the model up from the prompts: rows could then not join or leave."""
        return self._on_batch is not None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Set the base up for the client inside the block."""
        trained, client = self._trained, self._model.client
        with trained.client(client).in_state(trained.request(client), self._model.state) as (_, on_batch):
            self._on_batch = on_batch
            yield

    def read(self, prompts: PaddedBatch) -> None:
        """Pass the prompts to the method."""
        if self._on_batch:
            self._on_batch(prompts)

    def select(self, models: Sequence[ModelName]) -> None:
        """Do nothing: all rows belong to one model."""


def lanes_of(trained: TrainedRun) -> dict[ModelName, Lane]:
    """Return every model of a run with its lane; this reads all clients' personal states."""
    names = all_models(trained)
    found = {name: additions(trained, name) for name in names}
    mixed: Lane = MixedLane(trained, {name: added for name, added in found.items() if added is not None})
    return {name: mixed if found[name] is not None else OwnLane(trained, name) for name in names}
