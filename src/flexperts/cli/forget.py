"""`flexperts forget`: remove a silo that has left from a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run directory of a stopped, unfinished run.")],
    client: Annotated[str, typer.Argument(help="Name of the silo that will not come back.")],
    key: Annotated[
        bool, typer.Option("--key", help="Keep the silo; release its name for another SuperNode key.")
    ] = False,
) -> None:
    """Remove a silo that has left from a stopped run, so that the resumed run does not wait for it.

    A silo's name belongs to the key of its SuperNode; this releases the name.

    The effect of its past updates stays in the shared weights; the files at the silo do not change.
    """
    from flexperts.artifacts import RunDirectory
    from flexperts.server.forget_client import forget_client

    forget_client(RunDirectory.open(run), client, key_only=key)
    done = f"the name {client} is free for another key" if key else f"{client} is removed"
    typer.echo(f"{done}; resume the run with `flexperts run --resume`")
