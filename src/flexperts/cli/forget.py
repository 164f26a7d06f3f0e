"""`flexperts forget`: take a departed silo out of a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run directory of a run that was broken off.")],
    client: Annotated[str, typer.Argument(help="Name of the silo that will not come back.")],
) -> None:
    """Take a departed silo out of a stopped run, so that the resumed run no longer waits for it.

    What it has taught the shared weights stays in them; its own files at the silo are not touched.
    """
    from flexperts.artifacts import RunDirectory
    from flexperts.server.forget_client import forget

    forget(RunDirectory.open(run), client)
    typer.echo(f"{client} is out; go on with `flexperts run --resume`")
