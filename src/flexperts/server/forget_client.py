"""Taking a departed silo out of a stopped run."""

from __future__ import annotations

from flexperts.artifacts import RunDirectory
from flexperts.config.names import normal
from flexperts.errors import ArtifactError
from flexperts.files import sole_writer
from flexperts.methods.registry import make_method
from flexperts.recipe import recorded_recipe
from flexperts.server.checkpoint import load_server, save_server
from flexperts.server.enrolment import change_clients


def forget(run: RunDirectory, client: str) -> None:
    """Take a client out of a stopped run's checkpoint: name, report, and what the server keeps for it alone.

    What its updates have made of the shared weights stays in them. Rounds that are written down are left as they
    are. Should it come back, it joins as a new client.

    Args:
        run: The run; it must not be going on, and not have finished.
        client: Who has departed.

    Raises:
        ArtifactError: The run has no such client, no other one, has finished, or is going on.
        FlexpertsError: The method cannot go on without the client, or would have settled otherwise without it.
    """
    with sole_writer(run.path):
        _forget(run, client)


def _forget(run: RunDirectory, client: str) -> None:
    if run.has_finished:
        raise ArtifactError(f"{run.path}", "the run has finished", "forget clients of a run that was broken off")
    server, client = load_server(run.checkpoint), normal(client)
    if client not in server.clients:
        raise ArtifactError(
            f"client {client!r}", f"the run's clients are {', '.join(sorted(server.clients))}", "choose one"
        )
    if len(server.clients) == 1:
        raise ArtifactError(f"client {client!r}", "the run has no other", "delete the run")
    method = make_method(recorded_recipe(run.path).method)
    clients = {name: rows for name, rows in server.clients.items() if name != client}
    reports = {name: report for name, report in server.reports.items() if name != client}
    change_clients(method, server, clients, reports, "wait until it is back, or start a new run without it")
    save_server(run.checkpoint, server)
