"""One run's base, adapter and clients in a process, from message to message."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

from flexperts.client.client import Client
from flexperts.client.model import ClientModel
from flexperts.client.workspace import CLIENTS_KEPT, Workspace
from flexperts.config.run import RunConfig
from flexperts.methods.registry import make_method
from flexperts.observer import current_observer


class Resident:
    """One run's base, adapter and clients in this process.

    Args:
        workspace: Base and rows.
        config: The run; it may differ from the workspace's in the method only.
        folder: Where clients keep their files.
    """

    def __init__(self, workspace: Workspace, config: RunConfig, folder: Path) -> None:
        self.workspace, self.folder = workspace, folder
        self.model = ClientModel(workspace.base, config, make_method(config.method))
        self._client = lru_cache(CLIENTS_KEPT)(partial(_client, workspace, self.model, folder))

    def client(self, name: str) -> Client:
        """Return the client of that name; all it must remember lies on disk."""
        return self._client(name)


def _client(workspace: Workspace, model: ClientModel, folder: Path, name: str) -> Client:
    return Client(name, workspace, model, folder, current_observer())
