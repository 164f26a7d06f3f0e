"""`flexperts forget`: remove a silo that has left from a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run directory of a stopped, unfinished run.")],
    client: Annotated[str, typer.Argument(help="Name of the silo that will not come back.")],
) -> None:
    """Remove a silo that has left from a stopped run, so that the resumed run does not wait for it.

    The effect of its past updates stays in the shared weights; the files at the silo do not change.
    """
    from flexperts.artifacts import RunDirectory
    from flexperts.server.forget_client import forget_client

    forget_client(RunDirectory.open(run), client)
    typer.echo(f"{client} is removed; resume the run with `flexperts run --resume`")
