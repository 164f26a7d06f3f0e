"""Lanes: how the base is set up for a batch, for rows of many models together or for one model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from flexperts.data.batches import PaddedBatch
from flexperts.data.prompts import PromptEncoder
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.method import OnBatch
from flexperts.modeling.forward import Precision
from flexperts.serving.contract import ModelName
from flexperts.serving.engine.additions import Additions, all_additions, all_models
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
    """

    one_row = False

    def __init__(self, trained: TrainedRun) -> None:
        self._trained = trained
        # Keys only, so that values which many models share are stored once.
        self._keys: dict[ModelName, tuple[str | None, str | None]] = {}
        dtype = torch.bfloat16 if trained.config.model.precision == "bf16" else torch.float32
        self._lora, self._grafts = MixedLora(trained.model.base.model, dtype), MixedGrafts()

    def put(self, name: ModelName, added: Additions) -> None:
        """Add a model; the lane must not be open."""
        if added.lora_key and added.lora_key not in self._used(0):
            self._lora.put(added.lora_key, added.lora)
        if added.graft_key and added.graft_key not in self._used(1):
            self._grafts.put(added.graft_key, added.grafts)
        self._keys[name] = added.lora_key, added.graft_key

    def drop(self, client: str) -> None:
        """Remove what a client's models add; the lane must not be open."""
        self._keys = {name: keys for name, keys in self._keys.items() if name.client != client or not any(keys)}
        self._lora.keep(self._used(0))
        self._grafts.keep(self._used(1))

    def _used(self, kind: int) -> set[str | None]:
        return {keys[kind] for keys in self._keys.values()}

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


class Models(Mapping[ModelName, Lane]):
    """All models that an engine serves from one base, each with its lane.

    Args:
        base: The torch model.
        encoder: The encoder of prompts, and the tokenizer of answers.
        precision: In which the base computes.
    """

    def __init__(self, base: Any, encoder: PromptEncoder, precision: Precision) -> None:
        self.base, self.encoder, self.precision = base, encoder, precision

    @abstractmethod
    def encoder_of(self, client: str) -> PromptEncoder:
        """Return the encoder of a client's prompts."""

    @abstractmethod
    def in_memory(self, name: ModelName) -> Lane | None:
        """Return a model's lane; None if the model is not in memory."""

    @abstractmethod
    def has_room(self, models: Collection[ModelName]) -> bool:
        """Return whether all these models can be in memory together."""

    @abstractmethod
    def load(self, name: ModelName, kept: Collection[str]) -> None:
        """Load all models of a model's client; no lane may be open.

        Args:
            name: The model.
            kept: Clients that must stay in memory; together with the model's there must be room for them.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the base."""


class Lanes(Models):
    """Every model of a run with its lane; a client's models are loaded when one of them is asked for.

    Args:
        trained: The run.
        most_clients: Most clients whose models are in memory; those not used for longest leave. None means all.
    """

    def __init__(self, trained: TrainedRun, most_clients: int | None = None) -> None:
        super().__init__(trained.model.base.model, trained.workspace.encoder, trained.config.model.precision)
        self._trained, self._most = trained, most_clients or len(trained.clients)
        self._mixed = MixedLane(trained)
        self._lanes: dict[ModelName, Lane | None] = dict.fromkeys(all_models(trained))
        """None is a model that is not in memory."""
        for name in self._lanes:
            if name.state == "zero_shot":  # the base is in memory
                self._put(name, Additions())
        self._last_used: dict[str, None] = {}
        """Clients in memory, those not used for longest first."""
        for client in trained.clients:
            trained.client(client)  # a client without its state is refused at once

    def _put(self, name: ModelName, added: Additions | None) -> None:
        if added is not None:
            self._mixed.put(name, added)
        self._lanes[name] = OwnLane(self._trained, name) if added is None else self._mixed

    def __getitem__(self, name: ModelName) -> Lane:
        if (lane := self.in_memory(name)) is None:
            self.load(name, ())
            lane = self.in_memory(name)
        assert lane is not None
        return lane

    def __contains__(self, name: object) -> bool:
        return name in self._lanes  # a Mapping's own would load the model

    def __iter__(self) -> Iterator[ModelName]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def encoder_of(self, client: str) -> PromptEncoder:
        """Return the encoder of a client's prompts; its rows and state are not read."""
        return self._trained.encoder_of(client)

    def close(self) -> None:
        """Remove the run's adapters from the base."""
        self._trained.close()

    def in_memory(self, name: ModelName) -> Lane | None:
        """Return a model's lane; None if the model is not in memory."""
        lane = self._lanes[name]
        if lane is not None and name.client in self._last_used:
            self._last_used[name.client] = self._last_used.pop(name.client)
        return lane

    def has_room(self, models: Collection[ModelName]) -> bool:
        """Return whether all these models can be in memory together."""
        return len({name.client for name in models if name.state != "zero_shot"}) <= self._most

    def load(self, name: ModelName, kept: Collection[str]) -> None:
        """Load all models of a model's client; others leave if there is no room."""
        leaving = [client for client in self._last_used if client not in kept]
        for client in leaving[: max(0, len(self._last_used) + 1 - self._most)]:
            del self._last_used[client]
            self._mixed.drop(client)
            for own in self._of(client):
                if own.state != "zero_shot" and self._lanes[own] is self._mixed:
                    self._lanes[own] = None
        chosen = self._trained.client(name.client).has_chosen  # else choosing may train; only who asks for it waits
        wanted = [own for own in self._of(name.client) if own.state != "chosen" or chosen or own == name]
        for own, added in all_additions(self._trained, wanted).items():
            self._put(own, added)
        self._last_used[name.client] = None

    def _of(self, client: str) -> list[ModelName]:
        return [name for name in self._lanes if name.client == client]
