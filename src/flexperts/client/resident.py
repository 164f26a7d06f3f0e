"""One run's base, adapters and clients, kept in a process between messages."""

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
    """One run's base, adapters and clients in this process.

    Args:
        workspace: Base and rows.
        config: The run; only its method may differ from the workspace's.
        folder: The folder of the clients' files.
    """

    def __init__(self, workspace: Workspace, config: RunConfig, folder: Path) -> None:
        self.workspace, self.folder = workspace, folder
        self.model = ClientModel(workspace.base, config, make_method(config.method))
        self._client = lru_cache(CLIENTS_KEPT)(partial(_client, workspace, self.model, folder))

    def client(self, name: str) -> Client:
        """Return a client by name; its state is on disk."""
        return self._client(name)


def _client(workspace: Workspace, model: ClientModel, folder: Path, name: str) -> Client:
    return Client(name, workspace, model, folder, current_observer())
