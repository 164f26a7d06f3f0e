"""Removing a silo that has left from a stopped run."""

from __future__ import annotations

from flexperts.artifacts import RunDirectory
from flexperts.config.names import normal
from flexperts.errors import ArtifactError
from flexperts.files import sole_writer
from flexperts.methods.registry import make_method
from flexperts.recipe import recorded_recipe
from flexperts.server.checkpoint import load_server, save_server
from flexperts.server.enrolment import change_clients


def forget_client(run: RunDirectory, client: str, *, key_only: bool = False) -> None:
    """Remove a client from a stopped run's checkpoint: its name, its report, and the server's values for it.

    The effect of its past updates stays in the shared weights, and the rounds on record do not change. Its name is
    free: who comes with it joins as a new client.

    Args:
        run: The run; it must be stopped and unfinished.
        client: The client that has left.
        key_only: Keep the client, and release its name for a node with another key.
    """
    with sole_writer(run.path):
        _forget(run, client, key_only=key_only)


def _forget(run: RunDirectory, client: str, *, key_only: bool) -> None:
    if run.has_finished:
        raise ArtifactError(
            f"{run.path}", "the run has finished", "use `flexperts forget` on a run that was stopped before its end"
        )
    server, client = load_server(run.checkpoint), normal(client)
    if client not in server.clients:
        raise ArtifactError(
            f"client {client!r}", f"the run's clients are {', '.join(sorted(server.clients))}", "choose one of them"
        )
    server.nodes.pop(client, None)
    if key_only:
        save_server(run.checkpoint, server)
        return
    if len(server.clients) == 1:
        raise ArtifactError(f"client {client!r}", "the run has no other client", "delete the run's folder instead")
    config = recorded_recipe(run.path)
    method, server.max_share = make_method(config.method), config.federation.max_share
    clients = {name: rows for name, rows in server.clients.items() if name != client}
    reports = {name: report for name, report in server.reports.items() if name != client}
    server.flights.pop(client, None)
    server.silos.pop(client, None)
    if server.versions is not None:
        server.versions.held.pop(client, None)
    change_clients(method, server, clients, reports, "wait until it is back, or start a new run without it")
    save_server(run.checkpoint, server)
