"""`flexperts data`: make data files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make data files.")


@app.callback()
def _group() -> None:
    """Make data files."""


@app.command("make-silos")
def make_silos(
    folder: Annotated[Path, typer.Argument(help="Folder to write <silo>/train.jsonl and <silo>/test.jsonl into.")],
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
    train_rows: Annotated[int, typer.Option(help="Train rows per silo.")] = 96,
    test_rows: Annotated[int, typer.Option(help="Test rows per silo.")] = 40,
) -> None:
    """Write the data of the quick start: four silos whose house styles conflict."""
    from flexperts.data.silos.generate import write_silos

    for path in write_silos(folder, seed, train_rows, test_rows):
        typer.echo(path)
