"""What stays in a process between messages: Flower hands every message to a stateless function."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

from flwr.app import Context

from flexperts.config.run import RunConfig
from flexperts.federation.client import Client
from flexperts.federation.client_model import ClientModel
from flexperts.federation.observer import current_observer
from flexperts.federation.workspace import CLIENTS_KEPT, Workspace
from flexperts.methods.registry import make_method
from flexperts.recipe import parse_recipe


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


_residents: dict[tuple[str, str], Resident] = {}


def keep(recipe: str, folder: Path, workspace: Workspace, config: RunConfig) -> None:
    """Set up a run's resident around a workspace that is loaded already."""
    _residents[recipe, str(folder)] = Resident(workspace, config, folder)


def release(recipe: str, folder: Path) -> None:
    """Forget a run's resident and take its adapter out of the base."""
    _residents.pop((recipe, str(folder))).model.close()


def resident_client(context: Context) -> Client:
    """Return the client that a message is for, loading its run's base if this process has not yet.

    The node's configuration names the client (``client``) and its folder (``state-dir``); the run's configuration
    holds the recipe's text (``recipe``).
    """
    recipe, folder = str(context.run_config["recipe"]), str(context.node_config["state-dir"])
    if (recipe, folder) not in _residents:
        config = parse_recipe(recipe)
        keep(recipe, Path(folder), Workspace(config), config)
    return _residents[recipe, folder].client(str(context.node_config["client"]))
