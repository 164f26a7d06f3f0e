"""`flexperts server`: set up the machine of the SuperLink."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexperts.cli.silo import Notes

app = typer.Typer(no_args_is_help=True, help="Set up the machine of the SuperLink.")


@app.callback()
def _group() -> None:
    """Set up the machine of the SuperLink."""


@app.command("units")
def units(out: Annotated[Path, typer.Option(help="A new folder.")]) -> None:
    """Write a systemd unit for the SuperLink; see docs/operating.md."""
    from flexperts.deployment.units import write_server_units
    from flexperts.observer import observing

    with observing(Notes()):
        for path in write_server_units(out):
            typer.echo(f"{path}")
