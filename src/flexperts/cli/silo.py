"""`flexperts silo`: the worker of a silo, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexperts.cli.generate import About, State

app = typer.Typer(no_args_is_help=True, help="Serve a silo: its rows, its base and its personal models stay there.")

_Silo = Annotated[Path, typer.Argument(metavar="SILO.toml", help="The silo's file; see docs/deploy.md.")]


@app.callback()
def _group() -> None:
    """Serve a silo: its rows, its base and its personal models stay there."""


@app.command("serve")
def serve(silo: _Silo) -> None:
    """Hold the silo's base in memory and answer its SuperNode, until it is stopped (Ctrl-C or SIGTERM)."""
    import logging
    import os
    import signal
    import sys

    from flexperts.recipe import load_silo

    settings = load_silo(silo)
    os.umask(0o077)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(0))

    from flexperts.cli.console import console
    from flexperts.cli.display import RunDisplay
    from flexperts.deployment import listening

    with RunDisplay(console(stderr=True)) as display, listening.listening(Path(settings.state)) as door:
        from flexperts.deployment.worker import Worker

        handler = logging.StreamHandler()  # made in here: on a terminal, rich keeps its bar below these lines
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("flexperts").addHandler(handler)
        worker = Worker(settings, display)
        display.stage(f"{settings.name}: serving {settings.state}")
        listening.serve(door, worker.reply)


@app.command("check")
def check(silo: _Silo) -> None:
    """Read the silo's rows and look at its state folder, without loading the base."""
    from flexperts.config.data import ClientFiles, DataConfig
    from flexperts.data.clients import load_clients
    from flexperts.deployment.listening import is_served
    from flexperts.deployment.state import check_private
    from flexperts.recipe import load_silo

    settings = load_silo(silo)
    own = {settings.name: ClientFiles(train=settings.data.train, test=settings.data.test)}
    rows = load_clients(DataConfig(clients=own, columns=settings.data.columns), 0)[settings.name]
    typer.echo(f"{settings.name}: {len(rows.train)} train rows, {len(rows.test)} test rows")
    state = Path(settings.state)
    check_private(state)
    served = state.exists() and is_served(state)
    typer.echo(f"{state}: {'private' if state.exists() else 'it will be made'}")
    typer.echo("a worker serves it" if served else "no worker serves it now")


@app.command("runs")
def runs(silo: _Silo) -> None:
    """List the runs whose private state the silo keeps."""
    from rich.table import Table

    from flexperts.cli.console import console
    from flexperts.deployment.kept import kept_runs
    from flexperts.recipe import load_silo
    from flexperts.reports.cells import size

    settings = load_silo(silo)
    table = Table()
    for column in ("run", "method", "last round", "size"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("last round", "size") else "left")
    for kept in kept_runs(Path(settings.state), settings.name):
        table.add_row(kept.run, kept.method, str(kept.round), size(kept.bytes).text)
    console().print(table)


@app.command("generate")
def generate(
    silo: _Silo,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `silo runs` shows it.")],
    instruction: Annotated[str, typer.Argument(help="What to ask.")],
    context: About = "",
    state: State = None,
) -> None:
    """Print the answer of the silo's own model; nothing leaves this machine."""
    from flexperts.recipe import load_silo

    settings = load_silo(silo)

    from flexperts.deployment.home import HomeModel

    typer.echo(HomeModel(settings, run).generate(instruction, context, state))


@app.command("forget")
def forget(
    silo: _Silo,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `silo runs` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
) -> None:
    """Delete the private state of one run, its personal model included."""
    from flexperts.deployment.state import forget as delete
    from flexperts.deployment.state import run_folder
    from flexperts.recipe import load_silo

    state = Path(load_silo(silo).state)
    folder = run_folder(state, run)
    if yes or typer.confirm(f"Delete {folder} and the personal model in it?", abort=True):
        delete(state, run)
        typer.echo(f"{run}: forgotten")
