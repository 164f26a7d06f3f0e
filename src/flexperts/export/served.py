"""An exported folder behind the HTTP server: one model, which is in its base already."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from flexperts.data.batches import PaddedBatch
from flexperts.data.prompts import PromptEncoder
from flexperts.export.opened import ExportedFolder
from flexperts.serving.contract import ModelName
from flexperts.serving.engine.lanes import Lane, Models


class ExportedModel(Models):
    """The one model of an exported folder, under the folder's name.

    Args:
        folder: The folder; only this may use it until ``close``.
    """

    def __init__(self, folder: ExportedFolder) -> None:
        self._folder, self._open = folder, ExitStack()
        super().__init__(self._open.enter_context(folder.in_use()), folder.encoder, folder.precision)
        self._lanes: dict[ModelName, Lane] = {ModelName(folder.name, "personalized"): _AsItIs()}

    def __getitem__(self, name: ModelName) -> Lane:
        return self._lanes[name]

    def __iter__(self) -> Iterator[ModelName]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def encoder_of(self, client: str) -> PromptEncoder:
        """Return the encoder of training's prompts."""
        return self.encoder

    def in_memory(self, name: ModelName) -> Lane | None:
        """Return the model's lane."""
        return self._lanes[name]

    def has_room(self, models: Collection[ModelName]) -> bool:
        """Return True: there is one model."""
        return True

    def load(self, name: ModelName, kept: Collection[str]) -> None:
        """Do nothing: the model is in memory."""

    def close(self) -> None:
        """Free the base."""
        self._open.close()
        self._folder.close()


class _AsItIs:
    """A lane that changes nothing."""

    one_row = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        yield

    def read(self, prompts: PaddedBatch) -> None:
        pass

    def select(self, models: Sequence[ModelName]) -> None:
        pass
