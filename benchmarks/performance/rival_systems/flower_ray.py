"""Flower's Ray simulation of flexperts: the same server, the same client, other transport.

Fairness: as many Ray workers as there are cores, one core each, so that clients train at the same time (Flower's
own default is two cores a client, which makes half as many). Every worker holds a separate base and keeps it
between messages. Nodes of the simulation have no configuration of their own, so the client takes its name from its
number. Ray's dashboard and usage statistics are off. Its start counts to the first round.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from clock import Clock
from flexperts_rounds import RoundsDoneError, Watch, averaged
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import Tensor
from work import Work

from flexperts.artifacts import RunDirectory
from flexperts.client.answer import answer
from flexperts.client.client import Resident
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.recipe import parse_recipe
from flexperts.server.serve import serve


def run(work: Work, clock: Clock) -> dict[str, Tensor]:
    """Run the rounds and return the averaged adapter."""
    names = sorted(work.clients)
    local = {"address": "local", "num_cpus": os.cpu_count()}
    resources = {"init_args": local, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    with tempfile.TemporaryDirectory() as folder:
        with suppress(RoundsDoneError):
            run_simulation(
                server_app(work.config, Watch(clock, work.rounds), Path(folder)),
                NamedClients(work.config.to_toml(), folder, names),
                num_supernodes=len(names),
                backend_config=resources,
            )
        return averaged(Path(folder))


class NamedClients(ClientApp):
    """flexperts' clients, by the number of the node.

    Args:
        recipe: The recipe's text.
        folder: Where clients keep their state.
        names: The clients, in the order of the nodes.
    """

    def __init__(self, recipe: str, folder: str, names: list[str]) -> None:
        super().__init__()
        self.recipe, self.folder, self.names = recipe, folder, names

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        name = self.names[int(context.node_config["partition-id"])]
        client = resident(self.recipe, self.folder).client(name)
        return Message(answer(message.metadata.message_type, message.content, client), reply_to=message)


@cache
def resident(recipe: str, folder: str) -> Resident:
    """Return this worker's base and clients, loaded once."""
    config = parse_recipe(recipe)
    return Resident(Workspace(config), config, Path(folder))


def server_app(config: RunConfig, watch: Watch, folder: Path) -> ServerApp:
    """Return flexperts' server for Flower's thread."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, config, RunDirectory.create_or_resume(folder, config.to_toml()), watch)

    return app
